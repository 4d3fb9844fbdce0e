"""Hidden states compared layer by layer, against float64 and plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.models import hidden_states
from trainer.models.hidden_states import (
    HiddenLoss,
    HiddenPairs,
    blocks_of,
    collected,
    hidden_faults,
    hidden_pairs,
)
from trainer.spec.losses import HiddenSpec
from trainer.spec.sections import DistillSpec, LossesSpec

METRICS = ("mse", "cosine")


def config(kind: str = "llama", layers: int = 4, width: int = 16) -> Any:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": 2}
    if kind == "gpt2":
        return AutoConfig.for_model(kind, n_layer=layers, n_embd=width, n_head=2, vocab_size=40)
    return AutoConfig.for_model(
        kind, **sizes, intermediate_size=32, num_key_value_heads=2, head_dim=8, vocab_size=40
    )


# Which layers.


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (3, 3, [(0, 0), (1, 1), (2, 2)]),
        (2, 4, [(0, 1), (1, 3)]),
        (4, 8, [(0, 1), (1, 3), (2, 5), (3, 7)]),
        (1, 36, [(0, 35)]),
        (4, 2, [(0, 0), (1, 0), (2, 1), (3, 1)]),
        (3, 7, [(0, 1), (1, 4), (2, 6)]),
    ],
)
def test_auto_pairs_layers_at_the_same_share_of_the_depth(student, teacher, pairs) -> None:
    made = hidden_pairs(HiddenSpec(), config(layers=student), config(layers=teacher))
    assert made is not None and list(made.pairs) == pairs


@pytest.mark.parametrize("student", range(1, 9))
@pytest.mark.parametrize("teacher", range(1, 9))
def test_auto_never_goes_back_and_ends_with_the_last(student, teacher) -> None:
    pairs = hidden_states.same_share(student, teacher)
    assert [own for own, _ in pairs] == list(range(student))
    others = [other for _, other in pairs]
    assert others == sorted(others) and others[0] >= 0 and others[-1] == teacher - 1
    for own, other in pairs:  # no other layer of the teacher is nearer
        shares = [abs((layer + 1) / teacher - (own + 1) / student) for layer in range(teacher)]
        assert shares[other] == pytest.approx(min(shares))


def test_a_plan_says_widths_and_metric() -> None:
    spec = HiddenSpec(layers=[(1, 5), (0, 0)], metric="cosine")
    made = hidden_pairs(spec, config("gpt2", 2, 16), config("gemma2", 6, 24))
    assert made == HiddenPairs(((1, 5), (0, 0)), 16, 24, "cosine")
    assert made.student_layers == [1, 0] and made.teacher_layers == [5, 0]


def test_without_a_weight_there_is_no_plan() -> None:
    assert hidden_pairs(None, config(), config()) is None
    assert hidden_pairs(HiddenSpec(weight=0, layers=[(99, 99)]), config(), config()) is None


@pytest.mark.parametrize("pair", [(4, 0), (0, 6), (9, 9)])
def test_layers_that_are_not_there_are_refused_in_one_line(pair) -> None:
    spec = HiddenSpec(layers=[(0, 0), pair])
    distill = DistillSpec(mode="online", losses=LossesSpec(hidden=spec))
    (fault,) = hidden_faults(distill, config(layers=4), config(layers=6))
    assert fault == (
        f"distill.losses.hidden.layers: got {list(pair)}; may be [student layer, teacher layer] "
        "from [0, 0] to [3, 5]: the student has 4 layers, the teacher 6"
    )
    with pytest.raises(ValueError, match=r"^distill\.losses\.hidden\.layers: got"):
        hidden_pairs(spec, config(layers=4), config(layers=6))
    fine = DistillSpec(mode="online", losses=LossesSpec(hidden=HiddenSpec(layers=[(3, 5)])))
    assert hidden_faults(fine, config(layers=4), config(layers=6)) == []
    assert hidden_faults(DistillSpec(), config(), config()) == []


# Collecting.


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3"])
def test_states_are_those_of_transformers(kind) -> None:
    """But for the last, which transformers gives after the final norm."""
    model = AutoModelForCausalLM.from_config(config(kind, 3)).eval()
    ids = torch.arange(10).reshape(2, 5)
    with collected(model, [2, 0, 0]) as states, torch.no_grad():
        truth = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert sorted(states) == [0, 2] and states[0].shape == (2, 5, 16)
    torch.testing.assert_close(states[0], truth[1])
    norm = model.base_model.norm if kind != "gpt2" else model.base_model.ln_f
    torch.testing.assert_close(norm(states[2]), truth[3])


def test_nothing_is_left_of_collecting() -> None:
    model = AutoModelForCausalLM.from_config(config())
    with pytest.raises(KeyError), collected(model, [0]):
        raise KeyError
    assert not any(block._forward_hooks for block in blocks_of(model))


def test_a_recomputation_is_not_collected() -> None:
    """In the backward pass layers run once more, and their states are not those of the loss."""
    model = AutoModelForCausalLM.from_config(config()).train()
    seen: list[int] = []
    blocks_of(model)[1].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    ids = torch.arange(5).unsqueeze(0)
    grads = []
    for recomputes in (False, True):
        model.zero_grad()
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with collected(model, [1]) as states:
            last = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        kept = states[1]
        (last.sum() + kept.square().sum()).backward()
        assert states == {1: kept} and states[1] is kept
        grads.append(model.get_input_embeddings().weight.grad.clone())
    assert len(seen) == 3  # two forward passes and one recomputation
    torch.testing.assert_close(*grads)


def test_hooks_inside_of_a_checkpoint_collect_once() -> None:
    """Where a whole layer, hooks and all, is what runs again."""
    model = AutoModelForCausalLM.from_config(config()).train()
    block, calls = blocks_of(model)[0], []
    block.register_forward_hook(lambda *_: calls.append(1))
    states_in = torch.randn(1, 5, 16, requires_grad=True)
    rope = model.base_model.rotary_emb(states_in, torch.arange(5).unsqueeze(0))

    def layer(x: Any) -> Any:
        return block(x, position_embeddings=rope)

    with collected(model, [0]) as states, set_checkpoint_early_stop(False):
        out = checkpoint(layer, states_in, use_reentrant=False)
    first = states[0]
    (out.sum() + first.sum()).backward()
    assert len(calls) == 2 and states[0] is first


def test_a_model_whose_layers_are_not_found_is_refused_in_one_line() -> None:
    model = AutoModelForCausalLM.from_config(config(layers=2))
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"^distill\.losses\.hidden: the 5 layers of Llama"):
        blocks_of(model)


# The loss.


def batch(tokens: int = 24, own: int = 6, other: int = 6) -> tuple[Any, Any, Any]:
    """States [2, tokens / 2, width] of unlike sizes, and weights of which some are 0."""
    torch.manual_seed(1)
    sizes = torch.logspace(-2, 3, tokens).reshape(2, -1, 1)
    states = torch.randn(2, tokens // 2, own)
    wanted = torch.randn(2, tokens // 2, other) * sizes
    weights = torch.rand(tokens)
    weights[[0, 5, 23]] = 0
    return states, wanted, weights


def plainly(metric: str, own: Any, other: Any, weights: Any) -> Any:
    """From the definitions, in the dtype given."""
    own, other = own.flatten(0, 1), other.flatten(0, 1)
    if metric == "mse":
        value = (own - other).square().mean(dim=1) / other.square().mean(dim=1)
    else:
        value = 1 - torch.cosine_similarity(own, other, dim=1)
    return (value * weights)[weights > 0].sum()


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("widths", [(6, 6), (6, 9)])
def test_value_and_gradients_are_those_of_float64(monkeypatch, metric, widths, chunk) -> None:
    monkeypatch.setattr(hidden_states, "CHUNK_ELEMENTS", chunk)
    loss = HiddenLoss(HiddenPairs(((0, 0), (1, 3)), *widths, metric), torch.float32, 3)
    pairs = [batch(24, *widths), batch(24, *widths)]
    pairs[1] = (pairs[1][0] * 2 + 0.1, pairs[1][1] - 0.3, pairs[1][2])
    weights = pairs[0][2]
    states = [own.clone().requires_grad_() for own, _, _ in pairs]
    value = loss(states, [other for _, other, _ in pairs], weights)
    assert value.dtype == torch.float64 and value.ndim == 0
    (0.5 * value.float()).backward()

    doubles = [own.detach().double().requires_grad_() for own in states]
    maps = [m.weight.detach().double().requires_grad_() for m in loss.maps]
    assert len(maps) == (2 if widths[0] != widths[1] else 0)
    parts = [
        plainly(metric, own @ maps[i].T if maps else own, pairs[i][1].double(), weights.double())
        for i, own in enumerate(doubles)
    ]
    truth = 0.5 * sum(parts) / 2
    truth.backward()
    assert 0.5 * float(value.detach()) == pytest.approx(float(truth.detach()), rel=1e-6)
    for mine, other in zip(
        [*states, *(m.weight for m in loss.maps)], [*doubles, *maps], strict=True
    ):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("widths", [(6, 6), (6, 9)])
def test_tokens_of_weight_zero_may_hold_anything(metric, widths) -> None:
    loss = HiddenLoss(HiddenPairs(((0, 0),), *widths, metric), torch.float32, 3)
    results = []
    for odd in (1.0, torch.inf, torch.nan):
        own, other, weights = batch(24, *widths)
        own.flatten(0, 1)[weights == 0] = odd
        other.flatten(0, 1)[weights == 0] = -odd
        own.requires_grad_()
        loss.zero_grad()
        value = loss([own], [other], weights)
        value.backward()
        grads = [own.grad, *(m.weight.grad.clone() for m in loss.maps)]
        assert not own.grad.flatten(0, 1)[weights == 0].any()
        results.append([value.detach(), *grads])
    for result in results[1:]:
        for mine, first in zip(result, results[0], strict=True):
            assert torch.equal(mine, first)


@pytest.mark.parametrize("metric", METRICS)
def test_the_size_of_the_teachers_states_makes_no_difference(metric) -> None:
    """Else the deepest layers, and a few tokens, would be the whole loss."""
    loss = HiddenLoss(HiddenPairs(((0, 0),), 6, 6, metric), torch.float32, 3)
    own, other, weights = batch()
    first = loss([own], [other], weights)
    torch.testing.assert_close(loss([1000 * own], [1000 * other], weights), first)
    zeros = loss([torch.zeros_like(own)], [other], weights)  # as far as knowing nothing is
    assert float(zeros) == pytest.approx(float(weights.double().sum()), rel=1e-5)
    assert float(loss([other], [other], weights)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_states_of_zero_give_numbers(metric) -> None:
    loss = HiddenLoss(HiddenPairs(((0, 0),), 6, 6, metric), torch.float32, 3)
    _, other, weights = batch()
    for own, wanted in ((torch.zeros_like(other), other), (other, torch.zeros_like(other))):
        own = own.clone().requires_grad_()
        value = loss([own], [wanted], weights)
        value.backward()
        assert value.isfinite() and own.grad.isfinite().all()


def test_bfloat16_states_are_compared_in_float32() -> None:
    loss = HiddenLoss(HiddenPairs(((0, 0),), 6, 9, "mse"), torch.bfloat16, 3)
    own, other, weights = batch(24, 6, 9)
    low = own.bfloat16().requires_grad_()
    value = loss([low], [other.bfloat16()], weights)
    mapped = loss.maps[0](low.detach()).double()
    truth = plainly("mse", mapped.detach(), other.bfloat16().double(), weights.double())
    assert float(value.detach()) == pytest.approx(float(truth), rel=1e-6)
    value.backward()
    assert low.grad.dtype == torch.bfloat16 and loss.maps[0].weight.grad is not None


def test_maps_are_drawn_by_the_seed_and_keep_the_size() -> None:
    made = [HiddenLoss(HiddenPairs(((0, 0),), 64, 96, "mse"), torch.float32, s) for s in (3, 3, 4)]
    torch.manual_seed(0)
    weights = [loss.maps[0].weight for loss in made]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    states = torch.randn(500, 64)
    assert float(made[0].maps[0](states).detach().square().mean()) == pytest.approx(1, rel=0.1)
