"""What cells are held against besides KL: the accuracy they keep, and the 16-bit model's speed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.report.front import model_of, sums_of
from jobs.report.source import number
from quant.evaluation.bootstrap import Interval, relative_reduction


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
