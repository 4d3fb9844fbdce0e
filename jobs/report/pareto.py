"""Which cells are worth having: the Pareto front in true bytes and KL, ties called ties.

Every number here is of the part `select`: nothing is ever chosen on `report`. What a cell keeps of
its 16-bit baseline is computed here too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs.report.run_data import number
from quant.evaluation.bootstrap import (
    FEW,
    Interval,
    difference_interval,
    mean_interval,
    relative_reduction,
)

CLEAR = 25  # standard errors
OWN, TEACHER = "kl_to_reference", "kl_to_teacher"  # as `per_sequence` calls them


@dataclass(frozen=True)
class Candidate:
    """A measured cell. bytes: true bytes. kl: mean on select, nats per token.

    sums, tokens: of every sequence, what the mean is made of; None where only the mean is known.
    """

    key: str
    model: str  # the 16-bit model that it is made of
    bytes: float
    kl: float
    sums: tuple[float, ...] | None = None
    tokens: tuple[float, ...] | None = None
    result: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def interval(self) -> Interval | None:
        """The KL with its interval; None where only the mean is known."""
        if self.sums is None or self.tokens is None:
            return None
        return mean_interval(self.sums, self.tokens).within(0, float("inf"))


@dataclass(frozen=True)
class OnFront:
    """A cell of the front. tied: keys of those before it, no larger, that it is tied with."""

    candidate: Candidate
    tied: tuple[str, ...] = ()


def model_of(result: Mapping[str, Any]) -> str:
    """Which 16-bit model a cell is made of; older results know the student alone."""
    return str(result.get("model") or "student")


def yardstick(results: Iterable[Mapping[str, Any]]) -> str:
    """Which KL cells are compared in: to the 16-bit model they are made of, where that is one.

    Cells of student and teacher have none in common but the KL to the teacher, which is coarsened
    to its records for both alike.
    """
    return OWN if len({model_of(result) for result in results}) < 2 else TEACHER


def candidates(results: Mapping[str, Mapping[str, Any]], measure: str) -> list[Candidate]:
    """The cells with a size and a KL on select, from small to large; of one size the best first."""
    found = [_candidate(key, result, measure) for key, result in results.items()]
    known = [candidate for candidate in found if candidate is not None]
    return sorted(known, key=lambda candidate: (candidate.bytes, candidate.kl, candidate.key))


def _candidate(key: str, result: Mapping[str, Any], measure: str) -> Candidate | None:
    size, select = number(result.get("bytes")), result.get("select")
    if result.get("status", "done") != "done" or size is None or not isinstance(select, Mapping):
        return None
    model = model_of(result)
    sums, tokens = sums_of(select, measure), sums_of(select, "tokens")
    if sums is not None and tokens is not None and sum(tokens) > 0:
        return Candidate(key, model, size, sum(sums) / sum(tokens), sums, tokens, result)
    kl = number(select.get(TEACHER if measure == TEACHER else f"kl_to_{model}"))
    return None if kl is None else Candidate(key, model, size, kl, result=result)


def sums_of(part: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    """A value's sums over the sequences of a part; None unless all are finite numbers."""
    each = part.get("per_sequence")
    values = each.get(name) if isinstance(each, Mapping) else None
    if not isinstance(values, list | tuple) or not values:
        return None
    found = [number(value) for value in values]
    return tuple(value for value in found if value is not None) if None not in found else None


def difference(a: Candidate, b: Candidate) -> Interval | None:
    """KL of a less KL of b, nats per token, paired over sequences; None where they are not of the
    same sequences, or too few."""
    if a.sums is None or b.sums is None or a.tokens is None or a.tokens != b.tokens:
        return None
    found = difference_interval(a.sums, b.sums, a.tokens)
    return found if found.low is not None else None


def tied(a: Candidate, b: Candidate) -> bool:
    """Whether the paired interval of their difference contains 0; without one, whether they are
    equal."""
    if _far_apart(a, b):
        return False
    found = difference(a, b)
    return a.kl == b.kl if found is None else bool(found.holds_zero)


def _far_apart(a: Candidate, b: Candidate) -> bool:
    """Whether the difference is so many standard errors that no resampling is needed to tell.

    Most pairs of many cells are; the interval of each would take milliseconds. One sequence that
    stands out makes a difference of about one standard error, so all of them have to agree.
    """
    if a.sums is None or b.sums is None or a.tokens is None or a.tokens != b.tokens:
        return False
    tokens = np.asarray(a.tokens)
    change = np.asarray(a.sums) - np.asarray(b.sums)
    count = len(change)
    left = change - change.sum() / tokens.sum() * tokens
    error = np.sqrt(count / max(1, count - 1) * float(left @ left))
    return count >= FEW and abs(float(change.sum())) > CLEAR * error


def front(results: Mapping[str, Mapping[str, Any]], measure: str | None = None) -> list[OnFront]:
    """The cells that no other beats in true bytes and KL on select, from small to large.

    To be beaten is to be no smaller, and higher in KL by more than chance. Those that are no
    better than a smaller one by more than chance say so in `tied`. measure: see `yardstick`.
    """
    found: list[OnFront] = []
    for one in candidates(results, measure or yardstick(results.values())):
        # The lowest KL so far beats first; most cells need no second look.
        rivals = sorted((other.candidate for other in found), key=lambda rival: rival.kl)
        ties = []
        for rival in rivals:
            if tied(rival, one):
                ties.append(rival.key)
            elif rival.kl < one.kl:
                break
        else:
            found.append(OnFront(one, tuple(sorted(ties))))
    return found


def front_keys(results: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The keys on the front, with those that are tied, and those without numbers on select.

    With cells of several models: on the front of their own model, or on that of all.
    """
    done = {key: result for key, result in results.items() if result.get("status") == "done"}
    measure = yardstick(done.values())
    known = {one.key for one in candidates(done, measure)}
    keys = {one.candidate.key for one in front(done, measure)} | (done.keys() - known)
    if measure == OWN:
        return keys
    for model in {model_of(result) for result in done.values()}:
        own = {key: result for key, result in done.items() if model_of(result) == model}
        keys |= {one.candidate.key for one in front(own)}
    return keys


@dataclass(frozen=True)
class Baseline:
    """Decoding speeds of the 16-bit model that all cells are compared with.

    model: student, or teacher where no cell is made of the student. speeds: tokens per second by
    the name of the device; None: its results name none.
    """

    model: str
    speeds: dict[str | None, float]

    @staticmethod
    def of(cells: Mapping[str, Mapping[str, Any]]) -> Baseline:
        """Medians of what was measured beside the cells."""
        student = any(model_of(cell) == "student" for cell in cells.values())
        model = "student" if student else "teacher"
        found: dict[str | None, list[float]] = {}
        for cell in cells.values():
            speed = number(cell.get("baseline_decode_tokens_per_s"))
            if model_of(cell) == model and speed:
                found.setdefault(cell.get("device_name"), []).append(speed)
        return Baseline(model, {name: statistics.median(each) for name, each in found.items()})

    def speedup(self, cell: Mapping[str, Any]) -> float | None:
        """How many times as fast as that model a cell decodes; None where it is not known, also
        because the two were timed on different devices."""
        if model_of(cell) == self.model:
            return number(cell.get("speedup"))
        own, other = (
            number(cell.get("decode_tokens_per_s")),
            self.speeds.get(cell.get("device_name")),
        )
        return own / other if own is not None and other else None


def kept(part: Mapping[str, Any]) -> float | None:
    """Accuracy of a cell on a part, in percent of its 16-bit model's; None: not known."""
    own, reference = sums_of(part, "correct"), sums_of(part, "reference_correct")
    if own and reference and sum(reference) > 0 and len(own) == len(reference):
        return 100 * sum(own) / sum(reference)
    return number(part.get("retention"))


def retention(part: Mapping[str, Any]) -> Interval | None:
    """`kept` with its interval, paired over sequences, where there are sums of every one."""
    value = kept(part)
    own, reference = sums_of(part, "correct"), sums_of(part, "reference_correct")
    tokens = sums_of(part, "tokens")
    if own and reference and tokens and sum(reference) > 0 and len(own) == len(reference):
        lost = relative_reduction(reference, own, tokens)
        return lost.map(lambda share: 100 * (1 - share), falling=True)
    return None if value is None else Interval(value, None, None)
