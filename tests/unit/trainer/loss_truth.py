"""The losses by their definitions, in float64 and by autograd, and targets to try them on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.losses import JSD, ForwardKL, Loss, ReverseKL, SkewKL, Target
from trainer.strip import measure

TOKENS, VOCAB = 23, 61


def make_logits() -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits [tokens, vocab], float32 and float64."""
    torch.manual_seed(2)
    return torch.randn(TOKENS, VOCAB) * 2, torch.randn(TOKENS, VOCAB, dtype=torch.float64) * 2


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((found.double() - truth).norm() / truth.norm())


def value_and_grad(
    loss: Loss, logits: Tensor, target: Target, teacher: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss per token [tokens] and its gradient [tokens, vocab]."""
    ones = torch.ones(len(logits))
    of_teacher = None if teacher is None else teacher.float()
    values, grad = measure(logits.clone(), target, of_teacher, ones, [(1.0, loss)], True)
    return values[0], grad


def target_of(teacher: Tensor, k: int, temperature: float, labels: Tensor | None = None) -> Target:
    """Records of float64 teacher logits [tokens, vocab], as a capture would make them."""
    log_p = torch.log_softmax(teacher.double(), dim=-1)
    kept, ids = log_p.topk(k, dim=-1)
    rest = log_p.scatter(1, ids, float("-inf"))
    tail = torch.logsumexp(rest / temperature, dim=-1)
    if labels is None:
        labels = torch.arange(len(teacher)) % teacher.shape[1]
    return Target(labels, ids, kept.float(), tail.float())


def buckets(dense: Tensor, ids: Tensor) -> Tensor:
    """Probabilities [tokens, k + 1] of the ids [tokens, k] and of all the others together."""
    others = torch.ones_like(dense, dtype=torch.bool).scatter(1, ids, False)
    return torch.cat([dense.gather(1, ids), (dense * others).sum(dim=1, keepdim=True)], dim=1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Sum of p log(p / q); buckets of p = 0 count nothing."""
    ratio = torch.where(p > 0, p, 1.0) / torch.where(p > 0, q, 1.0)
    return (p * ratio.log()).sum(dim=1)


def mixed(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """The generalized Jensen-Shannon divergence."""
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


# Each loss by its definition, of probabilities [tokens, buckets].
DEFINITIONS: dict[str, tuple[Callable[[float], Loss], Callable[[Tensor, Tensor], Tensor]]] = {
    "forward_kl": (lambda t: ForwardKL(t), kl),
    "reverse_kl": (lambda t: ReverseKL(t), lambda p, q: kl(q, p)),
    "jsd": (lambda t: JSD(0.5, t), lambda p, q: mixed(p, q, 0.5)),
    "jsd 0.1": (lambda t: JSD(0.1, t), lambda p, q: mixed(p, q, 0.1)),
    "jsd 0.9": (lambda t: JSD(0.9, t), lambda p, q: mixed(p, q, 0.9)),
    "skew_kl": (lambda t: SkewKL(0.1, t), lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    "skew_kl 0.7": (lambda t: SkewKL(0.7, t), lambda p, q: kl(p, 0.7 * p + 0.3 * q)),
}


def exact(
    name: str, logits: Tensor, teacher: Tensor, temperature: float, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss per token and gradient of float64 logits by autograd; over buckets if ids are given."""
    logits = logits.detach().double().requires_grad_()
    q = torch.softmax(logits / temperature, dim=-1)
    p = torch.softmax(teacher.double() / temperature, dim=-1)
    if ids is not None:
        p, q = buckets(p, ids), buckets(q, ids)
    value = temperature**2 * DEFINITIONS[name][1](p, q)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), grad


def coarsened_kl(logits: Tensor, teacher: Tensor, k: int, temperature: float) -> Tensor:
    """T^2 KL of softmax(./T) over the teacher's k ids and one bucket for the rest: [tokens]."""
    return exact("forward_kl", logits, teacher, temperature, teacher.topk(k).indices)[0]


def ragged_rows(teacher: Tensor, temperature: float) -> tuple[list[Target], Target]:
    """Records of 1 to 9 ids per row, ascending: a target for each row alone, and one for all rows.

    Of some rows an id that is kept has no probability at all.
    """
    log_p = torch.log_softmax(teacher, dim=-1)
    rows = []
    for i, row in enumerate(log_p):
        count = 1 + i % 9
        ids = row.topk(count).indices.sort().values
        tail = row.scatter(0, ids, float("-inf"))
        kept = row[ids].clone()
        if i % 4 == 3:
            kept[i % count] = float("-inf")
        log_tail = torch.logsumexp(tail / temperature, dim=0)
        rows.append(Target(torch.zeros(1).long(), ids[None], kept[None], log_tail[None]))
    ids = torch.full((TOKENS, 9), -1)
    log_probs = torch.full((TOKENS, 9), float("-inf"), dtype=teacher.dtype)
    for i, row in enumerate(rows):
        assert row.ids is not None and row.log_probs is not None
        ids[i] = row.ids[0, 0]
        ids[i, : row.ids.shape[1]] = row.ids[0]
        log_probs[i, : row.ids.shape[1]] = row.log_probs[0]
    tails = torch.cat([row.log_tail for row in rows if row.log_tail is not None])
    return rows, Target(torch.zeros(TOKENS).long(), ids, log_probs, tails)


def drawn(teacher: Tensor, draws: int, seed: int) -> Target:
    """Records of ids drawn from float64 teacher logits [tokens, vocab], as the cache gives them."""
    noise = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(torch.softmax(teacher, -1), draws, replacement=True, generator=noise)
    width = max(len(row.unique()) for row in ids)
    unique = torch.zeros(len(ids), width, dtype=torch.int64)
    log_probs = torch.full((len(ids), width), float("-inf"))
    for i, row in enumerate(ids):
        found, counts = row.unique(return_counts=True)
        unique[i] = found[0]
        unique[i, : len(found)] = found
        log_probs[i, : len(found)] = (counts / draws).log()
    tails = torch.full((len(ids),), float("-inf"))
    return Target(torch.zeros(len(ids)).long(), unique, log_probs, tails)
