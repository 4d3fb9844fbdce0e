"""The fused head against float64 autograd through all logits at once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from trainer.fused import Head, chunk_tokens, fused_loss, head_of
from trainer.losses import Target, make_losses

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


def make_head(bias: bool = False, rows: int = VOCAB, **how) -> Head:
    torch.manual_seed(4)
    weight = (torch.randn(rows, WIDTH) * 0.5).requires_grad_()
    return Head(weight, torch.randn(rows).requires_grad_() if bias else None, VOCAB, **how)


def make_target(temperature: float, k: int = K) -> tuple[Target, Tensor]:
    """Records and the float64 teacher probabilities at the temperature behind them."""
    torch.manual_seed(5)
    teacher = torch.randn(TOKENS, VOCAB, dtype=torch.float64) * 2
    log_p = torch.log_softmax(teacher, dim=-1)
    kept, ids = log_p.topk(k, dim=-1)
    rest = log_p.scatter(1, ids, float("-inf")) / temperature
    target = Target(
        torch.randint(VOCAB, (TOKENS,)), ids, kept.float(), torch.logsumexp(rest, dim=-1).float()
    )
    return target, torch.softmax(teacher / temperature, dim=-1)


def make_hidden() -> Tensor:
    torch.manual_seed(6)
    return torch.randn(TOKENS, WIDTH)


def make_weights() -> Tensor:
    weights = torch.linspace(0.2, 1.5, TOKENS)
    weights[::5] = 0.0
    return weights


def exact_loss(
    hidden: Tensor, head: Head, target: Target, p: Tensor, weights: Tensor, temperature: float
) -> Tensor:
    """The same loss from its definition: all logits, log-softmax, coarsened KL, float64."""
    logits = head.scale * (hidden @ head.weight.T)
    if head.bias is not None:
        logits = logits + head.scale * head.bias
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits[:, :VOCAB]
    ce = nn.functional.cross_entropy(logits, target.labels, reduction="none")
    q = torch.softmax(logits / temperature, dim=-1)
    assert target.ids is not None
    kept_p, kept_q = p.gather(1, target.ids), q.gather(1, target.ids)
    kl = (kept_p * (kept_p / kept_q).log()).sum(dim=1)
    if target.ids.shape[1] < VOCAB:
        outside = torch.ones_like(p).scatter(1, target.ids, 0.0)
        tail_p, tail_q = (p * outside).sum(dim=1), (q * outside).sum(dim=1)
        kl = kl + tail_p * (tail_p / tail_q).log()
    return (weights * (SHARES["forward_kl"] * temperature**2 * kl + SHARES["ce"] * ce)).sum()


def relative(found: Tensor | None, truth: Tensor | None) -> float:
    assert found is not None and truth is not None
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("k", [K, VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradients_are_those_of_autograd(kind, temperature, k) -> None:
    head, hidden, weights = make_head(**HEADS[kind]), make_hidden(), make_weights()
    target, p = make_target(temperature, k)
    exact = Head(
        head.weight.detach().double().requires_grad_(),
        None if head.bias is None else head.bias.detach().double().requires_grad_(),
        VOCAB,
        head.scale,
        head.softcap,
    )
    exact_hidden = hidden.double().requires_grad_()
    truth = exact_loss(exact_hidden, exact, target, p, weights.double(), temperature)
    truth.backward()

    hidden = hidden.requires_grad_()
    loss, sums = fused_loss(hidden, head, target, weights, make_losses(SHARES, temperature), 8)
    loss.backward()
    assert abs(loss.item() / truth.item() - 1) <= 1e-6
    parts = dict(zip(SHARES, sums.tolist(), strict=True))
    assert sum(SHARES[name] * parts[name] for name in SHARES) == pytest.approx(truth.item(), 1e-6)
    assert relative(hidden.grad, exact_hidden.grad) <= 1e-5
    assert relative(head.weight.grad, exact.weight.grad) <= 1e-5
    if head.bias is not None:
        assert exact.bias is not None
        assert relative(head.bias.grad, exact.bias.grad) <= 1e-5


def run(
    step: int | None = 8, scale: float = 1.0, weights: Tensor | None = None, **changes: Tensor
) -> tuple[Tensor, ...]:
    """Loss, sums and gradients of one head, with some inputs changed."""
    head, hidden = make_head(bias=True, rows=VOCAB + 11), make_hidden().requires_grad_()
    target = replace(make_target(1.0)[0], **changes)
    weights = make_weights() if weights is None else weights
    loss, sums = fused_loss(hidden, head, target, weights, make_losses(SHARES, 1.0), step)
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
    target = make_target(1.0)[0]
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
    target, p = make_target(1.0)
    exact = replace(head, weight=low.weight.detach().double().requires_grad_())
    exact_hidden = low_hidden.detach().double().requires_grad_()
    truth = exact_loss(exact_hidden, exact, target, p, weights.double(), 1.0)
    truth.backward()
    loss, sums = fused_loss(low_hidden, low, target, weights, make_losses(SHARES, 1.0), 8)
    loss.backward()
    assert loss.dtype == torch.float32 and sums.dtype == torch.float64
    assert abs(loss.item() / truth.item() - 1) < 2e-3
    assert low_hidden.grad is not None and low_hidden.grad.dtype == torch.bfloat16
    assert relative(low_hidden.grad, exact_hidden.grad) < 0.02
    assert relative(low.weight.grad, exact.weight.grad) < 0.02


def test_log_sum_exp_is_never_taken_in_bf16() -> None:
    """Exact bf16 logits, so that all that is left is the arithmetic after them."""
    head = Head(torch.eye(VOCAB).bfloat16(), None, VOCAB)
    hidden = (torch.randn(TOKENS, VOCAB) * 3).bfloat16()
    labels = torch.randint(VOCAB, (TOKENS,))
    loss, _ = fused_loss(
        hidden, head, Target(labels), torch.ones(TOKENS), make_losses({"ce": 1.0}, 1.0)
    )
    truth = nn.functional.cross_entropy(hidden.double(), labels, reduction="sum")
    assert abs(loss.item() / truth.item() - 1) < 1e-6


def test_no_gradients_are_made_for_an_evaluation() -> None:
    head, hidden = make_head(), make_hidden().requires_grad_()
    with torch.no_grad():
        loss, _ = fused_loss(
            hidden, head, make_target(1.0)[0], make_weights(), make_losses(SHARES, 1.0)
        )
    assert not loss.requires_grad
    torch.testing.assert_close(
        loss,
        fused_loss(hidden, head, make_target(1.0)[0], make_weights(), make_losses(SHARES, 1.0))[0],
    )


def test_chunks_are_of_about_64_mib_and_never_all_tokens_of_a_large_vocabulary() -> None:
    assert chunk_tokens(151_936) * 151_936 * 4 <= 64 << 20
    assert chunk_tokens(1 << 20) == 16


def test_a_model_without_a_head_is_refused() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        head_of(LlamaModel(config))
