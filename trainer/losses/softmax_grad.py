"""All losses of a tile of logits, and the gradient of their sum.

Losses of one temperature share one softmax. Of a sparse teacher only the kept ids and the tail
have a logarithm taken; the rest of the vocabulary is one softmax over the ids that are not kept,
times a number per row:

    G = H - q sum(H)         per bucket, H the weighted derivatives by log q, T times
    kept id i, tail id j:    grad_i = G_i,  grad_j = softmax over the tail (j) x G_tail

Nothing is divided by the tail's mass and nothing is had as a difference of masses, so it is exact
however small the student's tail is. A cross-entropy with the label comes for its one entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.losses.divergences import Loss, Target

_INF = float("inf")
# What stands for the logarithm of a probability of 0: below what float32 holds, so that it weighs
# nothing, and finite, so that 0 log 0 is 0 and the reverse KL to an id without probability is.
NO_MASS = -100.0

Weighted = tuple[float, Loss]


def loss_and_gradient(
    logits: Tensor,
    target: Target,
    teacher: Tensor | None,
    weights: Tensor,
    losses: Sequence[Weighted],
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Float64 loss per token [losses, tokens], and d/dlogits of the sum of weight x share x loss.

    logits: float32 [tokens, vocab], contiguous, overwritten. teacher: float32 [tokens, vocab], the
    logits of a dense teacher, overwritten; None: the ids of `target`. weights: float32 [tokens].
    The gradient is float32 [tokens, vocab]; garbage without `needs_grad`.
    """
    groups: dict[float, list[int]] = {}
    for index, (_, loss) in enumerate(losses):
        groups.setdefault(loss.temperature, []).append(index)
    values = logits.new_empty(len(losses), len(logits), dtype=torch.float64)
    grad: Tensor | None = None
    for turn, (temperature, indices) in enumerate(groups.items()):
        last = turn == len(groups) - 1
        some = [losses[index] for index in indices]
        own = logits if last else logits.clone()
        if temperature != 1.0:
            own.mul_(1 / temperature)
        if teacher is not None and any(loss.needs_teacher for _, loss in some):
            of_teacher = teacher if last else teacher.clone()
            found, part = _dense(
                own, target.labels, of_teacher, weights, some, temperature, needs_grad
            )
        else:
            found, part = _sparse(own, target, weights, some, temperature, needs_grad)
        values[indices] = found.double()
        grad = part if grad is None else part.add_(grad)
    assert grad is not None
    return values, grad


def _sparse(
    logits: Tensor,
    target: Target,
    weights: Tensor,
    losses: Sequence[Weighted],
    temperature: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """`measure` of logits / T that share a softmax, against kept ids and a tail."""
    labels = target.labels.unsqueeze(1)
    ids, log_p = labels, None
    if any(loss.needs_teacher for _, loss in losses):
        ids, log_p = _teacher_buckets(target, temperature)
    at_label, kept = logits.gather(1, labels), logits.gather(1, ids)
    kept.masked_fill_(_unused(ids), -_INF)

    logits.scatter_(1, ids, -_INF)
    highest = logits.amax(dim=1, keepdim=True)
    tail = torch.softmax(logits, dim=1, out=logits)
    # The most likely id of the tail has exp(0) / sum.
    log_tail = highest - tail.amax(dim=1, keepdim=True).log_()
    if ids.shape[1] >= logits.shape[1]:  # there may be no tail
        log_tail = torch.where(highest == -_INF, highest, log_tail)
        tail.masked_fill_(highest == -_INF, 0.0)
    log_q = torch.cat([kept, log_tail], dim=1).double()
    log_sum = log_q.logsumexp(dim=1, keepdim=True)
    log_q = _finite(log_q.sub_(log_sum))
    log_label = at_label - log_sum

    values = []
    derivative = torch.zeros_like(log_q)
    on_label = torch.zeros_like(log_label)
    for share, loss in losses:
        weight = (share * temperature * weights).to(log_q.dtype).unsqueeze(1)
        if loss.needs_teacher:
            assert log_p is not None
            value, part = loss.terms(log_p, log_q)
            derivative.addcmul_(part, weight)
        else:
            value, part = loss.terms(torch.zeros_like(log_label), log_label)
            on_label.addcmul_(part, weight)
        values.append(value * temperature**2)
    if needs_grad:
        total = derivative.sum(dim=1, keepdim=True) + on_label
        buckets = derivative.addcmul_(log_q.exp_(), total, value=-1)
        buckets, on_label = buckets.to(tail.dtype), on_label.to(tail.dtype)
        tail.mul_(buckets[:, -1:])
        # Added, not set: slots without use name an id again, and what they add is 0.
        tail.scatter_add_(1, ids, buckets[:, :-1]).scatter_add_(1, labels, on_label)
    return torch.stack(values), tail


def _dense(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    weights: Tensor,
    losses: Sequence[Weighted],
    temperature: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """`measure` of logits / T that share a softmax, against the teacher's logits at T = 1."""
    if temperature != 1.0:
        teacher.mul_(1 / temperature)
    # Not log_softmax: over 150,000 ids its plain float32 sum is off by 5e-5, this one's is not.
    log_p = teacher.sub_(torch.logsumexp(teacher, dim=1, keepdim=True))
    log_q = logits.sub_(torch.logsumexp(logits, dim=1, keepdim=True))
    labels = labels.unsqueeze(1)
    log_label = log_q.gather(1, labels)
    values = []
    derivative: Tensor | None = None
    on_label = torch.zeros_like(log_label)
    for share, loss in losses:
        weight = (share * temperature * weights).to(log_q.dtype).unsqueeze(1)
        if loss.needs_teacher:
            value, part = loss.terms(log_p, log_q)
            if needs_grad:
                part.mul_(weight)
                derivative = part if derivative is None else derivative.add_(part)
        else:
            value, part = loss.terms(torch.zeros_like(log_label), log_label)
            on_label.addcmul_(part, weight)
        values.append(value * temperature**2)
    if derivative is None:
        return torch.stack(values), logits
    total = derivative.sum(dim=1, keepdim=True) + on_label
    derivative.addcmul_(log_q.exp_(), total, value=-1).scatter_add_(1, labels, on_label)
    return torch.stack(values), derivative


def _unused(ids: Tensor) -> Tensor:
    """The slots of ragged rows that repeat the first id, bool [tokens, k]."""
    unused = ids == ids[:, :1]
    unused[:, 0] = False
    return unused


def _finite(log_probs: Tensor) -> Tensor:
    """Probabilities of 0 as `NO_MASS`, in place."""
    return log_probs.masked_fill_(log_probs == -_INF, NO_MASS)


def _teacher_buckets(target: Target, temperature: float) -> tuple[Tensor, Tensor]:
    """Kept ids [tokens, k], and log-probabilities [tokens, k + 1] at T of them and the tail."""
    assert target.ids is not None and target.log_probs is not None and target.log_tail is not None
    kept = target.log_probs.double() / temperature
    log_p = torch.cat([kept, target.log_tail.double().unsqueeze(1)], dim=1)
    return target.ids, _finite(torch.log_softmax(log_p, dim=1))
