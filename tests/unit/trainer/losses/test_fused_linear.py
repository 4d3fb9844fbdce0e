"""The fused head against float64 autograd through all logits at once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from trainer.losses.divergences import JSD, CrossEntropy, ForwardKL, Loss, ReverseKL, SkewKL, Target
from trainer.losses.fused_linear import Head, chunk_tokens, fused_loss, head_of

TOKENS, WIDTH, VOCAB, K = 37, 24, 53, 6
SHARES = {"forward_kl": 0.7, "ce": 0.3}

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.6},
    "capped": {"softcap": 5.0},
    "padded": {"rows": VOCAB + 11},
    "all of it": {"bias": True, "scale": 1.7, "softcap": 4.0, "rows": VOCAB + 11},
}
# What a signal can be compared with; buckets without probability have no reverse KL.
ALL = {"forward_kl": 0.7, "reverse_kl": 0.2, "jsd": 0.4, "skew_kl": 0.5, "ce": 0.3}
SIGNALS = {
    "top-k": ALL,
    "all ids": ALL,
    "dense": ALL,
    "ragged": {name: share for name, share in ALL.items() if name != "reverse_kl"},
    "drawn": SHARES,
}


def weighted(
    temperature: float, shares: dict[str, float] = SHARES
) -> dict[str, tuple[float, Loss]]:
    """The losses of some shares."""
    made: dict[str, Loss] = {
        "forward_kl": ForwardKL(temperature),
        "reverse_kl": ReverseKL(temperature),
        "jsd": JSD(0.3, temperature),
        "skew_kl": SkewKL(0.2, temperature),
        "ce": CrossEntropy(),
    }
    return {name: (share, made[name]) for name, share in shares.items()}


def make_head(bias: bool = False, rows: int = VOCAB, width: int = WIDTH, **how) -> Head:
    torch.manual_seed(4)
    weight = (torch.randn(rows, width) * 0.5).requires_grad_()
    return Head(weight, torch.randn(rows).requires_grad_() if bias else None, VOCAB, **how)


def make_target(temperature: float, signal: str = "top-k", k: int = K) -> Target:
    """What a cache or a teacher of random logits would give."""
    torch.manual_seed(5)
    labels = torch.randint(VOCAB, (TOKENS,))
    if signal == "dense":  # of another width, with more rows and a softcap of its own
        head = make_head(bias=True, rows=VOCAB + 3, width=16, scale=1.3, softcap=6.0)
        return Target(labels, teacher_hidden=torch.randn(TOKENS, 16), teacher_head=head)
    log_p = torch.log_softmax(torch.randn(TOKENS, VOCAB, dtype=torch.float64) * 2, dim=-1)
    k = VOCAB if signal == "all ids" else k
    kept, ids = log_p.topk(k, dim=-1)
    tail = torch.logsumexp(log_p.scatter(1, ids, float("-inf")) / temperature, dim=-1)
    if signal == "drawn":  # shares of the draws, and no tail
        kept, tail = torch.log_softmax(kept, dim=-1), torch.full_like(tail, float("-inf"))
    if signal in ("ragged", "drawn"):  # rows of 1 to k ids; what is cut off is in no bucket
        unused = torch.arange(k) > torch.arange(TOKENS).unsqueeze(1) % k
        ids = torch.where(unused, ids[:, :1], ids)
        kept = kept.masked_fill(unused, float("-inf"))
    if signal == "ragged":
        kept[::4, 0] = float("-inf")  # a kept id without probability
    return Target(labels, ids, kept.float(), tail.float())


def make_hidden() -> Tensor:
    torch.manual_seed(6)
    return torch.randn(TOKENS, WIDTH)


def make_weights() -> Tensor:
    weights = torch.linspace(0.2, 1.5, TOKENS)
    weights[::5] = 0.0
    return weights


# The truth: float64 autograd through all logits at once, each loss by its definition.


def exact_head(head: Head) -> Head:
    """The same numbers in float64."""
    bias = None if head.bias is None else head.bias.detach().double().requires_grad_()
    return replace(head, weight=head.weight.detach().double().requires_grad_(), bias=bias)


def exact_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = head.scale * logits
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits[:, :VOCAB]


def exact_buckets(q: Tensor, target: Target, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """Probabilities (teacher's, student's) over the buckets of each token."""
    if target.teacher_hidden is not None:
        assert target.teacher_head is not None
        logits = exact_logits(target.teacher_hidden, target.teacher_head).detach()
        return list(zip(torch.softmax(logits / temperature, dim=-1), q, strict=True))
    assert target.ids is not None and target.log_probs is not None and target.log_tail is not None
    rows = []
    for i, own in enumerate(q):
        used = [
            slot for slot, id in enumerate(target.ids[i]) if slot == 0 or id != target.ids[i, 0]
        ]
        others = torch.ones(VOCAB, dtype=torch.bool)
        others[target.ids[i]] = False
        log_p = target.log_probs[i, used].double() / temperature
        p = torch.cat([log_p, target.log_tail[i, None].double()]).exp()
        rows.append((p / p.sum(), torch.cat([own[target.ids[i, used]], own[others].sum()[None]])))
    return rows


def exact_kl(p: Tensor, q: Tensor) -> Tensor:
    some = p > 0
    return (p[some] * (p[some] / q[some]).log()).sum()


def exact_loss(
    hidden: Tensor,
    head: Head,
    target: Target,
    weights: Tensor,
    temperature: float,
    shares: dict[str, float] = SHARES,
) -> Tensor:
    logits = exact_logits(hidden, head)
    q = torch.softmax(logits / temperature, dim=-1)
    ce = nn.functional.cross_entropy(logits, target.labels, reduction="none")
    sums: dict[str, list[Tensor]] = {name: [] for name in shares}
    for label_loss, (p, own) in zip(ce, exact_buckets(q, target, temperature), strict=True):
        m = 0.3 * p + 0.7 * own
        values = {
            "forward_kl": lambda p=p, own=own: exact_kl(p, own),
            "reverse_kl": lambda p=p, own=own: exact_kl(own, p),
            "jsd": lambda p=p, own=own, m=m: 0.3 * exact_kl(p, m) + 0.7 * exact_kl(own, m),
            "skew_kl": lambda p=p, own=own: exact_kl(p, 0.2 * p + 0.8 * own),
            "ce": lambda label_loss=label_loss: label_loss / temperature**2,
        }
        for name in shares:
            sums[name].append(temperature**2 * values[name]())
    weights = weights.double()
    return sum(share * (weights * torch.stack(sums[name])).sum() for name, share in shares.items())


def relative(found: Tensor | None, truth: Tensor | None) -> float:
    assert found is not None and truth is not None
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradients_are_those_of_autograd(kind, temperature, signal) -> None:
    head, hidden, weights = make_head(**HEADS[kind]), make_hidden(), make_weights()
    target, shares = make_target(temperature, signal), SIGNALS[signal]
    exact, exact_hidden = exact_head(head), hidden.double().requires_grad_()
    truth = exact_loss(exact_hidden, exact, target, weights, temperature, shares)
    truth.backward()

    hidden = hidden.requires_grad_()
    losses = weighted(temperature, shares)
    loss, sums = fused_loss(hidden, head, target, weights, losses, 8)
    loss.backward()
    assert abs(loss.item() / truth.item() - 1) <= 1e-6
    assert sum(
        share * value for share, value in zip(shares.values(), sums.tolist(), strict=True)
    ) == pytest.approx(truth.item(), 1e-6)
    assert relative(hidden.grad, exact_hidden.grad) <= 1e-5
    assert relative(head.weight.grad, exact.weight.grad) <= 1e-5
    if head.bias is not None:
        assert exact.bias is not None
        assert relative(head.bias.grad, exact.bias.grad) <= 1e-5


@pytest.mark.parametrize(
    ("name", "signal"), [(name, signal) for signal, served in SIGNALS.items() for name in served]
)
def test_each_loss_alone(name, signal) -> None:
    """One token at a time, and cross-entropy without a teacher."""
    head, hidden = make_head(softcap=5.0), make_hidden().requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    target, ones = make_target(1.0, signal), torch.ones(TOKENS)
    truth = exact_loss(exact_hidden, exact_head(head), target, ones, 1.0, {name: 1.0})
    truth.backward()
    given = Target(target.labels) if name == "ce" else target
    loss, _ = fused_loss(hidden, head, given, ones, weighted(1.0, {name: 1.0}), 1)
    loss.backward()
    assert abs(loss.item() / truth.item() - 1) <= 1e-6
    assert relative(hidden.grad, exact_hidden.grad) <= 1e-5


def test_teacher_and_student_of_qwens_rows() -> None:
    """One tokenizer, embeddings padded to other sizes: rows beyond its ids count nowhere."""
    torch.manual_seed(8)
    vocab, tokens = 151_669, 3
    teacher, weight = torch.randn(152_064, 8), torch.randn(151_936, 8).requires_grad_()
    hidden, seen = torch.randn(tokens, 8).requires_grad_(), torch.randn(tokens, 8)
    labels = torch.tensor([0, 5, vocab - 1])
    target = Target(labels, teacher_hidden=seen, teacher_head=Head(teacher, None, vocab))
    losses: dict[str, tuple[float, Loss]] = {"forward_kl": (1.0, ForwardKL())}
    head = Head(weight, None, vocab)
    loss, _ = fused_loss(hidden, head, target, torch.ones(tokens), losses)
    loss.backward()
    exact, exact_hidden = (value.detach().double().requires_grad_() for value in (weight, hidden))
    log_q = torch.log_softmax(exact_hidden @ exact[:vocab].T, dim=1)
    log_p = torch.log_softmax(seen.double() @ teacher[:vocab].double().T, dim=1)
    truth = (log_p.exp() * (log_p - log_q)).sum()
    truth.backward()
    assert abs(loss.item() / truth.item() - 1) <= 1e-6
    # Of so many ids the product with the weight alone rounds by more than the loss may.
    bare = (log_q.exp() - log_p.exp()).detach().float() @ weight.detach()[:vocab]
    product = relative(bare, exact_hidden.grad)
    assert relative(hidden.grad, exact_hidden.grad) <= product + 1e-5
    assert relative(weight.grad, exact.grad) <= 1e-5
    assert weight.grad is not None and not weight.grad[vocab:].any()


def test_a_tied_head_gets_both_gradients() -> None:
    """The same weight embeds the tokens and makes the logits."""
    torch.manual_seed(7)
    ids, target, ones = torch.randint(VOCAB, (TOKENS,)), make_target(1.0), torch.ones(TOKENS)
    weight = (torch.randn(VOCAB, WIDTH) * 0.5).requires_grad_()
    exact = weight.detach().double().requires_grad_()
    hidden = torch.tanh(nn.functional.embedding(ids, weight))
    fused_loss(hidden, Head(weight, None, VOCAB), target, ones, weighted(1.0), 8)[0].backward()
    exact_hidden = torch.tanh(nn.functional.embedding(ids, exact))
    exact_loss(exact_hidden, Head(exact, None, VOCAB), target, ones, 1.0).backward()
    assert relative(weight.grad, exact.grad) <= 1e-5


def run(
    step: int | None = 8, scale: float = 1.0, weights: Tensor | None = None, **changes: Tensor
) -> tuple[Tensor, ...]:
    """Loss, sums and gradients of one head, with some inputs changed."""
    head, hidden = make_head(bias=True, rows=VOCAB + 11), make_hidden().requires_grad_()
    target = replace(make_target(1.0), **changes)
    weights = make_weights() if weights is None else weights
    loss, sums = fused_loss(hidden, head, target, weights, weighted(1.0), step)
    (loss * scale).backward()
    assert hidden.grad is not None and head.weight.grad is not None and head.bias is not None
    return loss.detach(), sums, hidden.grad, head.weight.grad, head.bias.grad


@pytest.mark.parametrize("step", [1, 7, TOKENS, 1000, None])
def test_the_size_of_chunks_does_not_matter(step) -> None:
    for found, expected in zip(run(step), run(8), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


def test_the_gradient_from_above_is_multiplied_in() -> None:
    """A loss that autograd scales (accumulation, gradient averaging) must scale its gradients."""
    for found, expected in zip(run(scale=0.25)[2:], run()[2:], strict=True):
        torch.testing.assert_close(found, 0.25 * expected)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_tokens_of_weight_zero_may_hold_anything(garbage) -> None:
    unused = make_weights() == 0
    target = make_target(1.0)
    assert target.log_probs is not None and target.log_tail is not None
    found = run(
        log_probs=target.log_probs.masked_fill(unused[:, None], garbage),
        log_tail=target.log_tail.masked_fill(unused, garbage),
        labels=target.labels.masked_fill(unused, 0),
    )
    for value, expected in zip(found, run(), strict=True):
        torch.testing.assert_close(value, expected, equal_nan=False)
    assert not found[2][unused].any()


def test_all_tokens_of_weight_zero_are_a_loss_of_zero() -> None:
    for value in run(weights=torch.zeros(TOKENS)):
        assert not value.any()


def test_rows_beyond_the_vocabulary_learn_nothing() -> None:
    """A smaller vocabulary padded with logit 0 would be pushed down by every token."""
    _, _, _, weight_grad, bias_grad = run()
    assert not weight_grad[VOCAB:].any() and not bias_grad[VOCAB:].any()
    logits = make_head(rows=VOCAB + 11, softcap=4.0).logits(make_hidden())
    assert torch.isneginf(logits[:, VOCAB:]).all() and logits[:, :VOCAB].isfinite().all()


def test_bfloat16_is_close_and_sums_in_float32() -> None:
    """Log-sum-exp in bf16 is off by up to 1 %; the logits of bf16 hidden states are not."""
    head, hidden, weights = make_head(), make_hidden(), make_weights()
    low = replace(head, weight=head.weight.detach().bfloat16().requires_grad_())
    low_hidden = hidden.bfloat16().requires_grad_()
    target = make_target(1.0)
    exact = replace(head, weight=low.weight.detach().double().requires_grad_())
    exact_hidden = low_hidden.detach().double().requires_grad_()
    truth = exact_loss(exact_hidden, exact, target, weights, 1.0)
    truth.backward()
    loss, sums = fused_loss(low_hidden, low, target, weights, weighted(1.0), 8)
    loss.backward()
    assert loss.dtype == torch.float32 and sums.dtype == torch.float64
    assert abs(loss.item() / truth.item() - 1) < 2e-3
    assert low_hidden.grad is not None and low_hidden.grad.dtype == torch.bfloat16
    assert relative(low_hidden.grad, exact_hidden.grad) < 0.02
    assert relative(low.weight.grad, exact.weight.grad) < 0.02


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_hidden_states_of_weight_zero_may_hold_anything(garbage) -> None:
    """Zero times infinity is not zero: such tokens are left out of every product."""
    head, weights = make_head(), make_weights()
    hidden = make_hidden().masked_fill((weights == 0).unsqueeze(1), garbage).requires_grad_()
    loss, _ = fused_loss(hidden, head, make_target(1.0), weights, weighted(1.0), 8)
    loss.backward()
    assert loss.isfinite() and head.weight.grad is not None and head.weight.grad.isfinite().all()
    assert hidden.grad is not None and not hidden.grad[weights == 0].any()


@pytest.mark.parametrize("chunk", [1, 8])
def test_a_bfloat16_gradient_of_many_chunks_is_no_worse(chunk) -> None:
    """Few are summed in bfloat16, more in float32; both are as good as bfloat16 holds them."""
    low = replace(make_head(), weight=make_head().weight.detach().bfloat16().requires_grad_())
    hidden, target, ones = make_hidden().bfloat16(), make_target(1.0), torch.ones(TOKENS)
    exact = exact_head(low)
    exact_loss(hidden.double(), exact, target, ones, 1.0).backward()
    fused_loss(hidden, low, target, ones, weighted(1.0), chunk)[0].backward()
    assert relative(low.weight.grad, exact.weight.grad) < 6e-3


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products, and elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += str(func).split(".")[1] in ("mm", "addmm", "addmm_", "matmul")
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return made


@pytest.mark.parametrize("signal", SIGNALS)
def test_no_tensor_of_all_tokens_and_the_vocabulary_is_made(signal) -> None:
    head, hidden = make_head(), make_hidden().requires_grad_()
    target, losses = make_target(2.0, signal), weighted(2.0, SIGNALS[signal])
    with Watch() as watch:
        fused_loss(hidden, head, target, make_weights(), losses, 4)[0].backward()
    assert watch.largest == VOCAB * WIDTH < TOKENS * VOCAB  # the gradient of the weight


def test_only_the_products_that_are_asked_for_are_made() -> None:
    """None for gradients in an evaluation, none for a frozen head's weight (LoRA)."""
    for frozen, evaluating, expected in (
        (False, False, 3),
        (True, False, 2),
        (False, True, 1),
    ):
        head, hidden = make_head(), make_hidden().requires_grad_()
        head.weight.requires_grad_(not frozen)
        with torch.set_grad_enabled(not evaluating), Watch() as watch:
            loss, _ = fused_loss(hidden, head, make_target(1.0), torch.ones(TOKENS), weighted(1.0))
        assert watch.products == expected
        assert loss.requires_grad is not evaluating
        if not evaluating:
            loss.backward()
            assert (head.weight.grad is None) is frozen and hidden.grad is not None


def test_the_same_loss_with_and_without_gradients() -> None:
    head, hidden = make_head(softcap=5.0), make_hidden().requires_grad_()
    for signal, shares in SIGNALS.items():
        args = head, make_target(1.0, signal), make_weights(), weighted(1.0, shares)
        with torch.no_grad():
            found = fused_loss(hidden, *args)
        for value, expected in zip(found, fused_loss(hidden, *args), strict=True):
            assert torch.equal(value, expected)


def test_a_second_backward_pass_is_an_error() -> None:
    """The gradients are scaled where they lie; once more would scale them twice."""
    head, hidden = make_head(), make_hidden().requires_grad_()
    loss, _ = fused_loss(hidden, head, make_target(1.0), make_weights(), weighted(1.0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    target = make_target(1.0, "dense")
    assert target.teacher_head is not None
    target = replace(target, teacher_head=replace(target.teacher_head, vocab=VOCAB + 2))
    with pytest.raises(ValueError, match="teacher of 55 ids, student of 53"):
        fused_loss(make_hidden(), make_head(), target, make_weights(), weighted(1.0))


def test_chunks_are_small_and_never_all_tokens_of_a_large_vocabulary() -> None:
    assert chunk_tokens(8192) * 8192 * 4 <= 16 << 20
    assert chunk_tokens(1 << 20) == 64
    assert chunk_tokens(128_256, 2, "cuda") * 128_256 * 2 <= 512 << 20


def test_a_model_without_a_head_is_refused() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        head_of(LlamaModel(config))
