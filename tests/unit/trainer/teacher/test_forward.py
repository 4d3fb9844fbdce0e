"""Records made on the device, against float64 on the whole vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.logits.records import Coding
from trainer.losses.fused_linear import Head
from trainer.teacher import forward
from trainer.teacher.forward import BLOCK, TeacherWithRecords, largest, log_tails, tiles
from trainer.teacher.sampling import draw, stream, uniforms

VOCAB = 1000
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, **SMALL}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gemma2": {**LLAMA, "head_dim": 8, "final_logit_softcapping": 4.0},
    "granite": {**LLAMA, "logits_scaling": 3.0},
    "phi": {"hidden_size": 32, "intermediate_size": 48, **SMALL},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB},
}
TOPK = Coding("topk", VOCAB, 9, (2.0, 1.0))
EXACT = Coding("exact", VOCAB, 12)
DRAWN = Coding("sample", VOCAB, 11, ())


def make_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model with lively logits and biases."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**MODELS[kind], **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def inputs(batch: int = 3, length: int = 20) -> tuple[torch.Tensor, ...]:
    """Ids, positions with two documents, next tokens."""
    torch.manual_seed(1)
    ids = torch.randint(0, VOCAB, (batch, length))
    positions = torch.arange(length).expand(batch, -1).clone()
    positions[:, 7:] -= 7
    return ids, positions, ids.roll(-1, dims=1)


def streams(batch: int, redraws: int = 1) -> torch.Tensor:
    keys = [bytes([i] * 16) for i in range(batch)]
    return torch.tensor([[stream(5, key, r) for r in range(redraws)] for key in keys])


def logits_of(model: Any, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The model's own logits, float64 [tokens, rows]."""
    with torch.no_grad():
        found = model(input_ids=batch[0], position_ids=batch[1], use_cache=False).logits
    return found.double().reshape(-1, found.shape[-1])


def run(model: Any, coding: Coding, batch: Any, *more: Any, vocab: int = VOCAB) -> Any:
    with torch.inference_mode():
        return TeacherWithRecords(model, vocab)(*batch, coding, *more)


# The largest, and the rest.


@pytest.mark.parametrize("k", [1, 3, 9, 16, 40, 640])
@pytest.mark.parametrize("step", [0.0, 0.25, 4.0])
def test_largest_are_the_first_of_a_stable_sort(k, step) -> None:
    """step: logits are rounded to its multiples, so that ties are everywhere."""
    torch.manual_seed(k)
    logits = 3 * torch.randn(50, 20 * BLOCK)
    logits[:, 100:140] = -torch.inf
    logits[5] = 1.0
    if step:
        logits = (logits / step).round() * step + 0.0  # no negative zeros
    truth = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :k]
    assert (largest(logits, k).numpy() == truth).all()


def test_tails_are_sums_over_the_others_alone() -> None:
    """Down to a mass of 1e-20, which no difference to 1 in any float would give."""
    torch.manual_seed(0)
    temperatures = (0.7, 1.0, 2.0, 5.0)
    for height in (0.0, 10.0, 46.0):
        logits = torch.randn(40, 20 * BLOCK)
        logits[:, 3:8] += height
        p = torch.softmax(logits, dim=-1)
        ids = largest(logits, 5)
        first = p.gather(1, ids[:, :1]).log()
        found = log_tails(logits, p.clone(), ids, first, temperatures)
        log_p = torch.log_softmax(logits.double(), dim=-1)
        rest = log_p.scatter(1, ids, -torch.inf)
        truth = torch.stack([torch.logsumexp(rest / t, dim=-1) for t in temperatures], dim=-1)
        torch.testing.assert_close(found.double(), truth, atol=3e-6, rtol=1e-6)
    assert truth[:, 1].max() < np.log(1e-15)


# The module.


@pytest.mark.parametrize("kind", MODELS)
def test_kept_ids_are_those_of_the_models_own_logits(kind) -> None:
    """Heads with a bias, a scale and a soft cap among them."""
    model, batch = make_model(kind), inputs()
    log_p = torch.log_softmax(logits_of(model, batch)[:, :VOCAB], dim=-1)
    assert log_p.max(dim=-1).values.std() > 0.05
    for coding in (TOPK, EXACT):
        usable, ids, log_probs, tails, *scalars = run(model, coding, batch)
        assert usable.all() and ids.dtype == torch.int32 and log_probs.dtype == torch.float32
        kept = log_p.sort(dim=-1, descending=True).values[:, : coding.k]
        torch.testing.assert_close(log_probs.double(), kept, atol=2e-5, rtol=0)
        own = log_p.gather(1, ids.long())
        torch.testing.assert_close(log_probs.double(), own, atol=2e-5, rtol=0)
        rest = log_p.scatter(1, ids.long(), -torch.inf)
        truth = torch.stack([(rest / t).logsumexp(dim=-1) for t in coding.temperatures], dim=-1)
        torch.testing.assert_close(tails.double(), truth, atol=2e-5, rtol=0)
        if coding is EXACT:
            entropy = -(log_p.exp() * log_p).sum(dim=-1)
            torch.testing.assert_close(scalars[0].double(), entropy, atol=2e-5, rtol=0)
            true = log_p.gather(1, batch[2].reshape(-1, 1))[:, 0]
            torch.testing.assert_close(scalars[1].double(), true, atol=2e-5, rtol=0)
        else:
            assert not scalars


@pytest.mark.parametrize("kind", MODELS)
def test_draws_are_those_of_the_models_own_softmax(kind) -> None:
    model, batch = make_model(kind), inputs()
    usable, ids = run(model, DRAWN, batch, streams(3, 2))
    assert usable.all() and ids.shape == (60, 2, 11) and ids.dtype == torch.int32
    p = torch.softmax(logits_of(model, batch)[:, :VOCAB], dim=-1)
    sums = p.cumsum(dim=-1)
    for redraw in range(2):
        words = streams(3, 2)[:, redraw].repeat_interleave(20, dim=0)
        u = uniforms(words, torch.arange(20).repeat(3), 11).sort(dim=-1).values
        truth = torch.searchsorted(sums, u * sums[:, -1:], right=True)
        assert (ids[:, redraw] == truth).float().mean() > 0.995  # a number may be at an edge
    assert (ids[:, 0] == ids[:, 1]).float().mean() < 0.5


@pytest.mark.parametrize("coding", [TOPK, EXACT, DRAWN])
def test_ids_beyond_the_vocabulary_have_no_part(coding) -> None:
    """Rows of the head that pad it get large logits; the mass is the vocabulary's alone."""
    model, batch = make_model("phi"), inputs()
    vocab = 900  # not whole blocks
    batch = tuple(value % vocab for value in batch)
    with torch.no_grad():
        model.lm_head.bias[vocab:] += 50.0
    usable, ids, *rest = run(model, coding, batch, streams(3), vocab=vocab)
    assert usable.all() and ids.max() < vocab
    if coding is not DRAWN:
        one = coding.temperatures.index(1.0)
        mass = rest[0].exp().sum(dim=-1) + rest[1][:, one].exp()
        torch.testing.assert_close(mass, torch.ones(60), atol=1e-5, rtol=0)
        log_p = torch.log_softmax(logits_of(model, batch)[:, :vocab], dim=-1)
        own = log_p.gather(1, ids.long())
        torch.testing.assert_close(rest[0].double(), own, atol=2e-5, rtol=0)


@pytest.mark.parametrize("coding", [TOPK, EXACT, DRAWN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_gets_the_same_whatever_is_beside_it(coding, dtype, monkeypatch) -> None:
    """To the last bit, at every place in the batch, with products and tiles that end in it.

    (torch computes whole vectors and what is left of a tensor by different code: hence a sequence
    length at which the model's own activations are whole vectors.)
    """
    monkeypatch.setattr(forward, "CHUNK_TOKENS", 32)
    monkeypatch.setattr(forward, "CPU_TILE", 12 * VOCAB)
    model, batch, words = make_model(dtype=dtype), inputs(8, 22), streams(8)
    seen: dict[int, list[torch.Tensor]] = {}
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 2, 2, 2, 2], [1, 5, 6, 7, 0]):
        found = run(model, coding, [value[order] for value in batch], words[order])
        for place, sequence in enumerate(order):
            rows = [value[22 * place : 22 * place + 22] for value in found]
            for one, other in zip(rows, seen.setdefault(sequence, rows), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_are_told(bad) -> None:
    weight = torch.randn(VOCAB, 4)
    hidden = torch.randn(50, 4)
    hidden[17] = bad
    hidden[17, 1:] = 0.0
    weight[:, 0] = weight[:, 0].abs() + 1  # all infinities of one sign

    class Model:
        config = make_model().config
        base_model = staticmethod(
            lambda **_: type("Output", (), {"last_hidden_state": hidden.unsqueeze(0)})
        )
        get_output_embeddings = staticmethod(lambda: type("Linear", (), {"weight": weight}))

    teacher = object.__new__(TeacherWithRecords)
    torch.nn.Module.__init__(teacher)
    teacher.model, teacher.vocab = Model(), VOCAB
    nothing = torch.zeros(1, 50, dtype=torch.int64)
    for coding in (TOPK, EXACT, DRAWN):
        usable = teacher(nothing, nothing, nothing, coding, streams(1))[0]
        assert usable.tolist() == [place != 17 for place in range(50)]


def test_ids_at_minus_infinity_are_not_drawn_and_have_no_mass() -> None:
    model, batch = make_model("phi"), inputs()
    with torch.no_grad():
        model.lm_head.bias[1:] = -torch.inf
        model.lm_head.bias[[3, 500]] = 0.0
    usable, ids = run(model, DRAWN, batch, streams(3))
    assert usable.all() and set(ids.unique().tolist()) <= {0, 3, 500}
    usable, ids, log_probs, tails, entropy, _ = run(model, EXACT, batch)
    assert usable.all() and set(ids[:, :3].unique().tolist()) == {0, 3, 500}
    assert tails.isneginf().all() and log_probs[:, 3:].isneginf().all()
    log_p = torch.log_softmax(logits_of(model, batch), dim=-1)[:, [0, 3, 500]]
    truth = -(log_p.exp() * log_p).sum(dim=-1)
    torch.testing.assert_close(entropy.double(), truth, atol=2e-5, rtol=0)


def test_no_tensor_of_all_tokens_and_the_vocabulary_is_made(monkeypatch) -> None:
    monkeypatch.setattr(forward, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(forward, "CPU_TILE", 8 * VOCAB)
    model, batch = make_model(), inputs(4, 64)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            made = func(*args, **(kwargs or {}))
            for value in made if isinstance(made, tuple | list) else [made]:
                if isinstance(value, torch.Tensor):
                    sizes.append(value.untyped_storage().nbytes())
            return made

    for coding in (TOPK, EXACT, DRAWN):
        with Sizes(), torch.no_grad():
            TeacherWithRecords(model, VOCAB)(*batch, coding, streams(4))
    weights = 4 * VOCAB * 32
    assert weights <= max(sizes) <= max(weights, 4 * 16 * VOCAB, 8 * 8 * (VOCAB + BLOCK))
    assert max(sizes) < 4 * 256 * VOCAB / 4


@pytest.mark.parametrize("bias", [False, True])
def test_strips_are_the_heads_logits(bias, monkeypatch) -> None:
    monkeypatch.setattr(forward, "CHUNK_TOKENS", 10)
    monkeypatch.setattr(forward, "CPU_TILE", 1)  # tiles of 8
    torch.manual_seed(0)
    head = Head(torch.randn(90, 6), torch.randn(90) if bias else None, 70, scale=0.3, softcap=1.5)
    hidden = torch.randn(37, 6)
    truth = head.logits(hidden)[:, :70]
    found = torch.full((37, 70), torch.nan)
    products: list[int] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if "mm" in str(func):
                products.append(len(args[-2]))
            return func(*args, **(kwargs or {}))

    with Products():
        made = [tuple(value.clone() for value in tile) for tile in tiles(head, hidden)]
    assert products == [10] * 4  # also the last one
    for tokens, logits, space in made:
        assert logits.shape == space.shape == (len(tokens), 96)
        assert logits[:, 70:].isneginf().all() and found[tokens].isnan().all()
        found[tokens] = logits[:, :70]
    torch.testing.assert_close(found, truth, atol=1e-6, rtol=1e-6)


def test_draws_of_a_strip_are_those_of_the_whole() -> None:
    """`draw` on probabilities of a padded tile and of the vocabulary itself."""
    torch.manual_seed(0)
    p = torch.softmax(torch.randn(20, 3 * BLOCK), dim=-1)
    padded = torch.cat([p, torch.zeros(20, 2 * BLOCK)], dim=-1)
    u = torch.rand(20, 9, dtype=torch.float64)
    assert torch.equal(draw(p, u), draw(padded, u))
