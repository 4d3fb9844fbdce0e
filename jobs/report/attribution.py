"""Where the loss comes from: what distillation and what quantization added to the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.report.front import model_of, sums_of
from jobs.report.source import RunData
from quant.evaluation.bootstrap import Interval, difference_interval, relative_reduction


@dataclass(frozen=True)
class Attribution:
    """Loss of one model on the report part in nats per token, and the parts that it is made of.

    total = teacher + distilled + quantized, where all are known. distilled: what the student has
    more than the teacher; None for cells of the teacher, and where there is no teacher. quantized:
    what a cell has more than the 16-bit model it is made of; None for the student itself.
    """

    key: str
    total: float
    teacher: float | None
    distilled: Interval | None
    quantized: Interval | None


def attributions(data: RunData) -> list[Attribution]:
    """Of the student, and of every cell whose sums of every sequence are there; paired."""
    teacher, student = data.evaluations.get("teacher"), data.evaluations.get("student")
    distilled = paired(student, teacher, "nll")
    base = None if teacher is None else mean(teacher, "nll")
    found = []
    if student is not None and distilled is not None:
        total = mean(student, "nll")
        assert total is not None
        found.append(Attribution("student", total, base, distilled, None))
    for key, cell in data.cells.items():
        model = model_of(cell)
        quantized = paired(cell, data.evaluations.get(model), "nll")
        total = mean(cell, "nll")
        if quantized is None or total is None:
            continue
        more = distilled if model == "student" else None
        known = base if model == "teacher" or more is not None else None
        found.append(Attribution(key, total, known, more, quantized))
    return found


def mean(part: Mapping[str, Any], name: str) -> float | None:
    """A value's mean over the tokens of a part, from its sums of every sequence."""
    sums, tokens = sums_of(part, name), sums_of(part, "tokens")
    return sum(sums) / sum(tokens) if sums and tokens and sum(tokens) > 0 else None


def paired(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None, name: str) -> Interval | None:
    """The mean of a less that of b with its interval, of the same sequences; None if they differ,
    or sums of every sequence are missing."""
    sums = _pair(a, b, name)
    return None if sums is None else difference_interval(*sums)


def reduction(
    a: Mapping[str, Any] | None, b: Mapping[str, Any] | None, name: str
) -> Interval | None:
    """By which part b's mean is below a's (0.3: 30 % lower), with its paired interval; or None."""
    sums = _pair(a, b, name)
    return None if sums is None or sum(sums[0]) <= 0 else relative_reduction(*sums)


def _pair(
    a: Mapping[str, Any] | None, b: Mapping[str, Any] | None, name: str
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]] | None:
    if a is None or b is None:
        return None
    tokens = sums_of(a, "tokens")
    of_a, of_b = sums_of(a, name), sums_of(b, name)
    if not tokens or of_a is None or of_b is None or tokens != sums_of(b, "tokens"):
        return None
    if a.get("data_hash") != b.get("data_hash") and a.get("data_hash") and b.get("data_hash"):
        return None  # as many tokens, of other texts
    return of_a, of_b, tokens
