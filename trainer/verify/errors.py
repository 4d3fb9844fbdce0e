"""How faithful the records of a cache are to their teacher: errors beside the teacher's own noise.

Record error: what the coding has changed of what it keeps, as generalised KL. Truncation error:
what any record of these ids loses, were it exact, as KL to it with its tail spread evenly. Noise
floor: how far the teacher is from itself, in another batch shape, order and attention kernel, and
in float32 where it was captured in bfloat16; no record can be closer. All are means over positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.logits.records import Coding

# A record may differ from the teacher by what its coding rounds, and by twice the noise, which is
# four times in a KL: it may have been captured on other hardware, as far away on the other side.
FLOORS, KL_FLOORS = 2.0, 4.0
# Allowed beside the noise: of half-precision log-probabilities, in nats; of entropies and of the
# true token's log-probability, in nats; of draws that another rounding of a sum moves to the next
# id, as a share of all.
EXACT_ERROR, SCALAR_ERROR, MOVED_DRAWS = 1e-4, 1e-2, 1e-2
# Standard deviations from 0 that unbiased draws stay within.
Z_LIMIT = 5.0


@dataclass(frozen=True)
class Figure:
    """One measured error: what it is, the teacher's own noise in it, and how large it may be.

    value: None where there is nothing to measure; limit: None where it is not a fault.
    """

    value: float | None
    batch_noise: float | None = None
    dtype_noise: float | None = None
    limit: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the value is within its limit (NaN is not)."""
        return self.value is None or self.limit is None or abs(self.value) <= self.limit


@dataclass(frozen=True)
class Faithfulness:
    """The figures of one kind of records, by name."""

    kind: str
    sequences: int
    positions: int
    figures: dict[str, Figure]

    @property
    def holds(self) -> bool:
        """Whether all figures are within their limits."""
        return all(figure.holds for figure in self.figures.values())


class Tally:
    """Sums of per-position values, and the figures that they make."""

    def __init__(self) -> None:
        self.positions = 0
        self._sums: dict[str, float] = {}

    def add(self, **values: Tensor) -> None:
        """Adds float64 [positions] of each name."""
        self.positions += len(next(iter(values.values())))
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.sum())

    def mean(self, name: str) -> float | None:
        """The mean over positions; None if there is no value of this name."""
        return self._sums[name] / self.positions if name in self._sums else None

    def total(self, name: str) -> float:
        """The sum over positions."""
        return self._sums[name]

    def figure(self, name: str, allowed: float, floors: float = FLOORS) -> Figure:
        """A mean beside its noise (`name` + `_batch`, `_dtype`), and the limit these make."""
        batch, dtype = self.mean(f"{name}_batch"), self.mean(f"{name}_dtype")
        floor = max(abs(batch or 0.0), abs(dtype or 0.0))
        return Figure(self.mean(name), batch, dtype, allowed + floors * floor)


def gkl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Generalised KL, sum over the last axis of p log(p/q) - p + q, with 0 log 0 = 0.

    Both are logs of masses that need not sum to 1 (Cichocki and Amari, Entropy 2010, 12(6)).
    """
    p, q = log_p.exp(), log_q.exp()
    # Where both are minus infinity the difference is no number; where only q is, infinity is right.
    product = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
    return (product - p + q).sum(dim=-1)


def kept_errors(
    ids: Tensor,
    log_q: Tensor,
    log_tails: Tensor,
    temperatures: tuple[float, ...],
    log_p: Tensor,
    noisy: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The errors of records that keep the most likely ids, in nats: float64 [positions], by name.

    record, tail: of what is kept; truncation: of what is not; missed: of that what the teacher's
    own most likely ids, as many, would not lose.
    ids: int64 [positions, width], log_q: float [positions, width] and log_tails: float
    [positions, temperatures] as decoded; log_p: float64 [positions, vocab], the teacher's; noisy:
    the same of other runs of it, by name of the noise.
    """
    log_q = log_q.double()
    kept = log_q > -torch.inf
    # Unused slots repeat a kept id, so that nothing else is taken out of the tail.
    ids = torch.where(kept, ids, ids.gather(1, log_q.argmax(dim=1, keepdim=True)))

    def split(log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logs of the kept ids' probabilities, of the others', and of the tails' shares."""
        rest = log_p.scatter(1, ids, -torch.inf)
        tails = _log_sums(rest, temperatures) - _log_sums(log_p, temperatures)
        return torch.where(kept, log_p.gather(1, ids), -torch.inf), rest, tails

    own, rest, tails = split(log_p)
    found = (log_q, log_tails.double() - _log_sums(log_p, temperatures))
    values = {"record": gkl(own, found[0]), "tail": _worst(tails, found[1])}
    for name, other in noisy.items():
        other_kept, _, other_tails = split(other)
        values[f"record_{name}"] = gkl(own, other_kept)
        values[f"tail_{name}"] = _worst(tails, other_tails)
    values["truncation"] = _spread_kl(rest)
    # The teacher's own most likely ids, as many in each row.
    best = torch.topk(log_p, ids.shape[1], dim=1).indices
    count = kept.sum(dim=1, keepdim=True)
    ranks = torch.arange(ids.shape[1], device=ids.device)
    best = torch.where(ranks < count, best, best[:, :1])
    values["missed"] = values["truncation"] - _spread_kl(log_p.scatter(1, best, -torch.inf))
    return values


def scalar_errors(
    entropy: Tensor,
    true_log_prob: Tensor,
    labels: Tensor,
    log_p: Tensor,
    noisy: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The absolute errors of what records for evaluation hold besides: float64 [positions].

    labels: int64 [positions], the true tokens.
    """
    own = _scalars(log_p, labels)
    found = {"": (entropy.double(), true_log_prob.double())}
    found |= {f"_{name}": _scalars(other, labels) for name, other in noisy.items()}
    values = {}
    for name, other in found.items():
        values[f"entropy{name}"] = (own[0] - other[0]).abs()
        # A token that the teacher rules out has minus infinity on both sides.
        values[f"true{name}"] = torch.where(own[1] == other[1], 0.0, (own[1] - other[1]).abs())
    return values


def drawn_errors(
    ids: Tensor,
    log_shares: Tensor,
    draws: int,
    logits: Tensor,
    noisy: dict[str, Tensor],
    redraw: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """What tells whether records hold draws from the teacher's distribution: float64 [positions].

    ids, log_shares: [positions, width] as decoded; logits: float32 [positions, vocab]; redraw:
    the draws [positions, draws] that the capture makes of logits.
    """
    counts = (log_shares.double().exp() * draws).round()
    log_p = torch.log_softmax(logits.double(), dim=1)
    p = log_p.exp()
    logs = log_p.clamp_min(-1e4)
    entropy = -(p * logs).sum(dim=1)
    mean = (counts * logs.gather(1, ids)).sum(dim=1) / draws
    dense = torch.zeros_like(log_p)
    made = _counts(redraw(logits), dense)
    values = {
        "draws": (counts.sum(dim=1) - draws).abs(),
        "moved": 1.0 - torch.minimum(dense.scatter_add(1, ids, counts), made).sum(dim=1) / draws,
        "bias": mean + entropy,
        "variance": ((p * logs.square()).sum(dim=1) - entropy.square()).clamp_min(0.0) / draws,
        "unique": (counts > 0).sum(dim=1).double(),
    }
    for name, other in noisy.items():
        again = _counts(redraw(other), dense)
        values[f"moved_{name}"] = 1.0 - torch.minimum(made, again).sum(dim=1) / draws
    return values


def kept_figures(tally: Tally, coding: Coding) -> dict[str, Figure]:
    """The figures of records with ids, tails and, for evaluation, scalars."""
    # An error of half a step in the root of a probability costs step^2 / 2.
    allowed = EXACT_ERROR if coding.method == "exact" else coding.k * coding.step**2 / 2
    figures = {
        "record": tally.figure("record", allowed, KL_FLOORS),
        "tail": tally.figure("tail", allowed, KL_FLOORS),
        "missed": tally.figure("missed", allowed, KL_FLOORS),
        "truncation": Figure(tally.mean("truncation")),
    }
    if coding.method == "exact":
        figures["entropy"] = tally.figure("entropy", SCALAR_ERROR)
        figures["true"] = tally.figure("true", SCALAR_ERROR)
    return figures


def drawn_figures(tally: Tally) -> dict[str, Figure]:
    """The figures of records with draws."""
    error = tally.total("variance") ** 0.5
    bias = tally.total("bias")
    z = bias / error if error > 0 else (0.0 if abs(bias) < 1e-6 * tally.positions else torch.inf)
    return {
        "moved": tally.figure("moved", MOVED_DRAWS),
        "z": Figure(z, limit=Z_LIMIT),
        "draws": Figure(tally.mean("draws"), limit=0.0),
        "unique": Figure(tally.mean("unique")),
    }


def _log_sums(log_p: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """Logs of the sums of p^(1/T): [positions, temperatures]."""
    return torch.stack([torch.logsumexp(log_p / t, dim=1) for t in temperatures], dim=1)


def _worst(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The largest generalised KL among the single masses of each row."""
    return gkl(log_p.unsqueeze(-1), log_q.unsqueeze(-1)).max(dim=1).values


def _spread_kl(rest: Tensor) -> Tensor:
    """KL of a tail [positions, vocab] (minus infinity elsewhere) to the same mass spread evenly."""
    is_other = rest > -torch.inf
    even = torch.logsumexp(rest, dim=1) - is_other.sum(dim=1).clamp_min(1).log()
    return gkl(rest, torch.where(is_other, even.unsqueeze(1), rest))


def _scalars(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and the true token's log-probability: [positions] each."""
    entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(dim=1)
    return entropy, log_p.gather(1, labels.unsqueeze(1)).squeeze(1)


def _counts(ids: Tensor, like: Tensor) -> Tensor:
    """How often each id is in the rows of ids [positions, draws]."""
    return torch.zeros_like(like).scatter_add(1, ids, torch.ones_like(ids, dtype=like.dtype))
