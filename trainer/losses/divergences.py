"""The losses, and what they are compared with.

A divergence of two distributions is a sum over buckets: of a dense teacher every id is one; of a
sparse one the kept ids are, and all the rest together are the last, the tail. A loss is one small
class whose `terms` maps the log-probabilities of the buckets to its value and to its derivative by
the student's log-probabilities. `trainer.losses.softmax_grad` makes the log-probabilities, once for
all losses of one temperature, and of the derivatives the gradient of the logits.

All are of softmax(logits / T) and times T squared, which keeps the gradient's size independent of
the temperature (Hinton et al., 2015, Distilling the Knowledge in a Neural Network, section 2).

Source of the tail bucket: the kept ids and "all the rest" are a coarsening of the distribution, and
an f-divergence of a coarsening, as all of these are, is a lower bound of the full one that forgets
no mass (data processing inequality, Cover and Thomas, Elements of Information Theory, 2.8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.models.head import Head


@dataclass(frozen=True)
class Target:
    """What the logits of some tokens are compared with.

    labels: int64 [tokens], the next token.

    A sparse teacher: ids: int64 [tokens, k] and log_probs, float32 [tokens, k]: the teacher's kept
    ids at temperature 1 (log of the full softmax), or ids that were drawn and their share of the
    draws. A row with fewer ids repeats its first one, with a log-probability of minus infinity, in
    the slots that are left. log_tail: float32 [tokens], log of the sum over all other ids of
    p^(1/T), for the losses' temperature T; minus infinity without a tail.

    A dense teacher: teacher_hidden: [tokens, teacher width], its final hidden states, and
    teacher_head, which makes its logits of them.
    """

    labels: Tensor
    ids: Tensor | None = None
    log_probs: Tensor | None = None
    log_tail: Tensor | None = None
    teacher_hidden: Tensor | None = None
    teacher_head: Head | None = None

    def at(self, tokens: slice | Tensor) -> Target:
        """The tokens of a slice, or those that an int64 tensor [n] lists."""

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[tokens]

        return Target(
            self.labels[tokens],
            cut(self.ids),
            cut(self.log_probs),
            cut(self.log_tail),
            cut(self.teacher_hidden),
            self.teacher_head,
        )

    @property
    def has_teacher(self) -> bool:
        """Whether there are distributions of a teacher."""
        sparse = self.ids is not None and self.log_probs is not None and self.log_tail is not None
        return sparse or (self.teacher_hidden is not None and self.teacher_head is not None)


class Loss(Protocol):
    """A loss of two distributions p and q; see the module's docstring.

    needs_teacher: p is the teacher's distribution; else it is the label's, all mass on it.
    """

    needs_teacher: bool

    @property
    def temperature(self) -> float: ...

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Value [tokens] and its derivative by log_q [tokens, buckets], a tensor of its own.

        log_p, log_q: float32 [tokens, buckets], finite, of sum 1. The derivative holds up to a
        multiple of q in each row, as no such change moves the logits.
        """
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with the next token: -log q(label)."""

    needs_teacher = False
    temperature = 1.0

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """One bucket, the label's: log_p is 0 and of no account."""
        return -log_q.sum(dim=1), torch.full_like(log_q, -1.0)


@dataclass(frozen=True)
class ForwardKL:
    """KL(p || q) = sum of p (log p - log q), p the teacher.

    With ids drawn from the teacher (temperature 1, no tail) the gradient is q - p', p' the share of
    the draws: unbiased, as p' is. The value is KL(p' || q), which is on average above
    KL(teacher || student) by a number that does not depend on the student.
    """

    temperature: float = 1.0
    needs_teacher = True

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """d/dlog q = -p."""
        p = log_p.exp()
        return _dot(p, log_p - log_q), p.neg_()


@dataclass(frozen=True)
class ReverseKL:
    """KL(q || p) = sum of q (log q - log p), q the student (Gu et al., 2024, MiniLLM)."""

    temperature: float = 1.0
    needs_teacher = True

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """d/dlog q = q (log q - log p), up to q."""
        derivative = (log_q - log_p).mul_(log_q.exp())
        return derivative.sum(dim=1), derivative


@dataclass(frozen=True)
class JSD:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1.

    Agarwal et al., 2024, On-Policy Distillation of Language Models, section 2.
    """

    beta: float = 0.5
    temperature: float = 1.0
    needs_teacher = True

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """d/dlog q = (1 - beta) q (log q - log m): what m depends on q by cancels."""
        ratio = log_p - log_q
        mixed = _log_mixed(ratio, self.beta)
        derivative = log_q.exp().mul_(mixed).mul_(self.beta - 1)
        of_p = _dot(log_p.exp(), ratio.sub_(mixed))
        return self.beta * of_p + derivative.sum(dim=1), derivative


@dataclass(frozen=True)
class SkewKL:
    """KL(p || alpha p + (1 - alpha) q), 0 < alpha < 1.

    Ko et al., 2024, DistiLLM: Towards Streamlined Distillation for Large Language Models.
    """

    alpha: float = 0.1
    temperature: float = 1.0
    needs_teacher = True

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """d/dlog q = -p (1 - alpha) q / m."""
        ratio = log_p - log_q
        mixed = _log_mixed(ratio, self.alpha)
        p = log_p.exp()
        value = _dot(p, ratio.sub_(mixed))
        return value, p.mul_(mixed.neg_().exp_()).mul_(self.alpha - 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over buckets of a x b; overwrites b."""
    return b.mul_(a).sum(dim=1)


def _log_mixed(ratio: Tensor, share: float) -> Tensor:
    """log m - log q, m = share p + (1 - share) q, of ratio = log p - log q.

    Taken relative to q, so that the rounding of log q itself, as large as its size, is left out.
    """
    other = ratio.new_full((), math.log1p(-share))
    return torch.logaddexp(ratio + math.log(share), other)
