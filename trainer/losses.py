"""Losses on one chunk of logits: value per token, and the gradient of the logits.

A loss is one small class with two members: `needs_teacher`, and `value_and_grad(logits, target)`
mapping float32 logits [tokens, vocab] to the loss per token [tokens] and its gradient
[tokens, vocab]. The gradient is written out by hand, so that the fused head (`trainer.fused`)
needs no graph over the vocabulary. Entries of minus infinity are ids that do not exist.

Source of the tail bucket: the kept ids and "all the rest" are a coarsening of the distribution, and
the KL of a coarsening is a lower bound of the full KL that forgets no mass (data processing
inequality, Cover and Thomas, Elements of Information Theory, 2.8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Below this the student's tail mass has no precision left in float32; its logarithm stays finite.
_TINY = 1e-37


@dataclass(frozen=True)
class Target:
    """What the logits of a chunk of tokens are compared with.

    labels: int64 [tokens], the next token. ids: int64 [tokens, k] and log_probs, float32
    [tokens, k]: the teacher's kept ids at temperature 1 (log of the full softmax), or ids that
    were drawn and their share of the draws. A row with fewer ids repeats its first one, with a
    log-probability of minus infinity, in the slots that are left. log_tail: float32 [tokens], log
    of the sum over all other ids of p^(1/T), for the loss's temperature T; minus infinity without
    a tail.
    """

    labels: Tensor
    ids: Tensor | None = None
    log_probs: Tensor | None = None
    log_tail: Tensor | None = None

    def rows(self, start: int, stop: int) -> Target:
        """The tokens from `start` to `stop`."""

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[start:stop]

        return Target(
            self.labels[start:stop], cut(self.ids), cut(self.log_probs), cut(self.log_tail)
        )


class Loss(Protocol):
    """One loss; see the module's docstring."""

    needs_teacher: bool

    def value_and_grad(self, logits: Tensor, target: Target) -> tuple[Tensor, Tensor]: ...


class CrossEntropy:
    """Cross-entropy with the next token: -log q(label)."""

    needs_teacher = False

    def value_and_grad(self, logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Loss [tokens] and gradient [tokens, vocab] (softmax minus one-hot)."""
        log_q = torch.log_softmax(logits, dim=-1)
        labels = target.labels.unsqueeze(1)
        value = -log_q.gather(1, labels).squeeze(1)
        grad = log_q.exp_()
        grad.scatter_add_(1, labels, grad.new_full(labels.shape, -1.0))
        return value, grad


class ForwardKL:
    """KL(teacher || student) over the kept ids and one bucket for the rest, times T squared.

    T squared keeps the gradient's size independent of the temperature (Hinton et al., 2015,
    Distilling the Knowledge in a Neural Network, section 2).

    With ids drawn from the teacher (temperature 1, no tail) the gradient is q - p', p' the share of
    the draws: unbiased, as p' is. The value is KL(p' || q), which is on average above
    KL(teacher || student) by a number that does not depend on the student.
    """

    needs_teacher = True

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def value_and_grad(self, logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Loss [tokens] and gradient [tokens, vocab].

        With e = exp(logits / T): the gradient is T (q - p) on kept ids and
        T e (1 / sum - p_tail / sum_tail) on the others. The sum over the others is taken with the
        kept ids zeroed, not as a difference, which would cancel.
        """
        if target.ids is None or target.log_probs is None or target.log_tail is None:
            raise ValueError("forward_kl needs the teacher's records")
        temperature = self.temperature
        unused = target.ids == target.ids[:, :1]
        unused[:, 0] = False
        log_p = target.log_probs / temperature
        log_norm = torch.logaddexp(torch.logsumexp(log_p, dim=1), target.log_tail)
        # A kept id may have no probability at all; 0 log 0 = 0, and 0 times infinity is not.
        log_p = (log_p - log_norm.unsqueeze(1)).clamp_min(-1e4)
        log_p_tail = target.log_tail - log_norm
        p, p_tail = log_p.exp(), log_p_tail.exp()

        scaled = logits / temperature
        highest = scaled.max(dim=1, keepdim=True).values
        exps = scaled.sub_(highest)
        kept_logits = exps.gather(1, target.ids)
        exps.exp_().scatter_(1, target.ids, 0.0)
        tail_sum = exps.sum(dim=1).clamp_min(_TINY)
        kept = kept_logits.exp().masked_fill_(unused, 0.0)
        total = tail_sum + kept.sum(dim=1)
        log_total = total.log()

        value = (p * (log_p - kept_logits + log_total.unsqueeze(1))).sum(dim=1)
        # 0 log 0 = 0: a teacher with no tail asks nothing of the student's.
        tail_value = p_tail * (log_p_tail - tail_sum.log() + log_total)
        value = value + torch.where(p_tail > 0, tail_value, torch.zeros_like(tail_value))

        exps.mul_((1 / total - p_tail / tail_sum).unsqueeze(1))
        # Added, as unused slots name an id again; what they add is 0.
        exps.scatter_add_(1, target.ids, kept / total.unsqueeze(1) - p)
        return value * temperature**2, exps.mul_(temperature)


def make_losses(weights: Mapping[Any, float], temperature: float) -> dict[str, tuple[float, Loss]]:
    """The losses of a spec by name, each with its weight; weights of 0 are left out."""
    known: dict[str, Loss] = {"forward_kl": ForwardKL(temperature), "ce": CrossEntropy()}
    unknown = set(weights) - set(known)
    if unknown:
        raise ValueError(f"unknown losses {sorted(unknown)}; may be {sorted(known)}")
    return {name: (weight, known[name]) for name, weight in weights.items() if weight > 0}
