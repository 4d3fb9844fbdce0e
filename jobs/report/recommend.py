"""One cell for given limits, why, and the command that exports it.

It is chosen on `select` alone, as everything is; the tables tell what it does on `report`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from jobs.report import formats as f
from jobs.report.pareto import (
    OWN,
    TEACHER,
    Baseline,
    Candidate,
    candidates,
    kept,
    model_of,
    retention,
    tied,
    yardstick,
)
from jobs.report.run_data import RunData, number

__all__ = ["Recommendation", "in_words", "recommend"]
ENOUGH = 99.0  # percent of the accuracy that is to be kept where no limit is given


@dataclass(frozen=True)
class Recommendation:
    """key: the cell; None where none fits, and `refused` says in a line why, with the nearest.

    why: lines. ties: keys of cells that are as good. command: exports the cell.
    """

    key: str | None
    why: list[str] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)
    command: str | None = None
    refused: str | None = None


@dataclass(frozen=True)
class _Limit:
    """One limit. option: as it is given. words: what the cells within it do, "" of a size.

    value: of a cell, None where it is not known; above says on which side of `bound` it fits.
    """

    option: str
    words: str
    bound: float
    above: bool
    value: Callable[[Candidate], float | None]
    show: Callable[[float | None], str]

    def miss(self, one: Candidate) -> float:
        """By which part of the bound a cell is on its wrong side; 0 where it fits."""
        value = self.value(one)
        if value is None:
            return float("inf")
        short = self.bound - value if self.above else value - self.bound
        return max(0.0, short / self.bound)


def recommend(
    data: RunData,
    max_mb: float | None = None,
    min_retention: float | None = None,
    min_speed: float | None = None,
    *,
    run: str | None = None,
    models: Collection[str] = ("student", "teacher"),
) -> Recommendation:
    """The one cell to take, among those within all limits.

    max_mb: true bytes in 10^6. min_retention: percent of the next-token accuracy on select of the
    16-bit model that the cell is made of. min_speed: decoding speed over the 16-bit student's (the
    teacher's where no cell is made of the student). run: what the export command calls the run.
    models: whose cells there are to choose from.

    With max_mb or min_speed it is the cell with the lowest KL on select; those whose paired
    interval of the difference to it contains 0 are as good, and the smallest of them is taken,
    then the fastest. With min_retention and without max_mb it is the smallest. Without limits it
    is the smallest that keeps 99 % of the accuracy; if none does, the one with the lowest KL.
    Cells of student and teacher together are compared in KL to the teacher. Raises ValueError, one
    line per fault, for limits that are not above 0.
    """
    options = {"--max-mb": max_mb, "--min-retention": min_retention, "--min-speed": min_speed}
    wrong = [
        f"{name} {v:g}: must be above 0" for name, v in options.items() if v is not None and v <= 0
    ]
    if wrong:
        raise ValueError("\n".join(wrong))
    cells = {key: cell for key, cell in data.cells.items() if model_of(cell) in models}
    choice = _Choice(
        data, data.name if run is None else run, yardstick(cells.values()), Baseline.of(data.cells)
    )
    known = candidates(cells, choice.measure)
    if not known:
        what = "no cell was measured on select; run its sweep again" if cells else "it has no cells"
        return Recommendation(None, refused=f"{choice.run}: {what}")
    limits = choice.limits(max_mb, min_retention, min_speed)
    without = choice.without_quantization(max_mb, min_retention, min_speed)
    fitting = [one for one in known if not any(limit.miss(one) for limit in limits)]
    if not fitting:
        return Recommendation(None, why=without, refused=choice.refusal(limits, known))
    words = f"of at most {max_mb:g} MB" if max_mb is not None else ""
    does = " and ".join(limit.words for limit in limits if limit.words)
    words += f"{' ' if words else ''}that {does}" if does else ""
    enough = [one for one in known if (choice.kept(one) or 0) >= ENOUGH] if not limits else []
    if enough:
        fitting, words = enough, f"that keep at least {ENOUGH:g} % of the accuracy"
    if enough or (min_retention is not None and max_mb is None):
        rule = f"The smallest of the {_cells(len(fitting))} {words}."
        fitting = [one for one in fitting if one.bytes == fitting[0].bytes]
    else:
        rule = f"The lowest KL of the {_cells(len(fitting))}{' ' if words else ''}{words}."
        if not limits:
            rule += f" None keeps {ENOUGH:g} % of the accuracy."
    best, ties = _best(fitting)
    why = [
        choice.numbers(best),
        rule,
        *([_about_ties(best, ties)] if ties else []),
        *choice.remarks(best, min_retention),
        *without,
        "Chosen on the part select alone.",
    ]
    return Recommendation(best.key, why, [one.key for one in ties], choice.command(best))


def in_words(found: Recommendation) -> list[str]:
    """The answer as lines for a terminal: the cell, why, the command."""
    if found.key is None:
        return [str(found.refused), *found.why]
    return [f"Recommended: {found.key}", *found.why, *([found.command] if found.command else [])]


def _best(fitting: list[Candidate]) -> tuple[Candidate, list[Candidate]]:
    """The lowest KL; of those tied with it the smallest, then the fastest. And the other ones."""
    lowest = min(fitting, key=lambda one: one.kl)
    alike = [one for one in fitting if one is lowest or tied(one, lowest)]
    # Speeds of different devices say nothing of the cells.
    devices = {one.result.get("device_name") for one in alike}

    def place(one: Candidate) -> tuple[float, float, float, str]:
        speed = number(one.result.get("decode_tokens_per_s")) or 0.0
        return one.bytes, -speed if len(devices) == 1 else 0.0, one.kl, one.key

    best = min(alike, key=place)
    return best, sorted((one for one in alike if one is not best), key=place)


def _about_ties(best: Candidate, ties: list[Candidate]) -> str:
    told = ", ".join(f"{one.key} ({f.size(one.bytes)})" for one in ties)
    size = "the smallest of them" if ties[0].bytes > best.bytes else "no larger"
    return (
        f"Tied with {told}: the 95 % interval of the paired difference in KL contains 0. "
        f"It is {size}."
    )


def _cells(number: int) -> str:
    return "one cell" if number == 1 else f"{number} cells"


@dataclass(frozen=True)
class _Choice:
    """What a choice is made with; says numbers of cells in words."""

    data: RunData
    run: str
    measure: str
    baseline: Baseline

    def kept(self, one: Candidate) -> float | None:
        """Percent of its 16-bit model's accuracy on select."""
        return kept(one.result.get("select") or {})

    def limits(
        self, max_mb: float | None, min_retention: float | None, min_speed: float | None
    ) -> list[_Limit]:
        found = []
        if max_mb is not None:
            option = f"--max-mb {max_mb:g}"
            found.append(_Limit(option, "", max_mb * 1e6, False, lambda one: one.bytes, f.size))
        if min_retention is not None:
            words = f"keep at least {min_retention:g} % of the accuracy"
            option = f"--min-retention {min_retention:g}"
            found.append(_Limit(option, words, min_retention, True, self.kept, f.percent))
        if min_speed is not None:
            words = (
                f"decode at least {min_speed:g} times as fast as the 16-bit {self.baseline.model}"
            )
            option = f"--min-speed {min_speed:g}"
            speed = lambda one: self.baseline.speedup(one.result)  # noqa: E731
            found.append(_Limit(option, words, min_speed, True, speed, f.factor))
        return found

    def refusal(self, limits: list[_Limit], known: list[Candidate]) -> str:
        """Why no cell fits, and which comes nearest."""
        asked = " and ".join(limit.option for limit in limits)
        near = min(known, key=lambda one: (max(limit.miss(one) for limit in limits), one.kl))
        misses, others = [], []
        for limit in limits:
            value = limit.value(near)
            shown = limit.show(value) if value is not None else "what was not measured"
            if limit.miss(near):
                misses.append(f"{shown} misses {limit.option}")
            else:
                others.append(shown)
        also = f" (and has {' and '.join(others)})" if others else ""
        return (
            f"{self.run}: no cell of {len(known)} fits {asked}; the nearest is {near.key}: "
            f"{' and '.join(misses)}{also}; loosen what it misses"
        )

    def numbers(self, one: Candidate) -> str:
        """Size, KL, retention and speed of a cell in a sentence."""
        to = f"the 16-bit {one.model}" if self.measure == OWN else "the teacher"
        parts = [
            f.size(one.bytes),
            f"KL {f.with_interval(one.kl, one.interval())} nats per token to {to}",
        ]
        share = retention(one.result.get("select") or {})
        if share is not None:
            told = f.with_interval(share.value, share, 1, " %")
            parts.append(f"{told} of the 16-bit {one.model}'s accuracy")
        speed = self.baseline.speedup(one.result)
        if speed is not None:
            device = one.result.get("device_name")
            where = f" on {device}" if device else ""
            parts.append(
                f"{f.factor(speed)} the decoding speed of the 16-bit {self.baseline.model}{where}"
            )
        return ", ".join(parts) + "."

    def remarks(self, one: Candidate, min_retention: float | None) -> list[str]:
        """What else there is to know of the chosen cell."""
        found = []
        if self.measure == TEACHER:
            found.append(
                "Cells of the student and of the teacher are compared in KL to the teacher, which "
                "is coarsened to its records; accuracy is held against each one's own model."
            )
        share = retention(one.result.get("select") or {})
        low = None if share is None else share.low
        if min_retention is not None and low is not None and low < min_retention:
            found.append(
                f"The interval of its retention reaches below {min_retention:g} %: more sequences "
                "in data.select_sequences would tell."
            )
        bits = number((one.result.get("spec") or {}).get("bits")) or 8
        if bits < 4 or one.result.get("layers"):
            found.append(
                "Other programs' formats have no codes as narrow: an export is larger than "
                f"cells/{one.key}/model, which stillhouse generate runs."
            )
        if one.result.get("model_kept") is False:
            found.append(
                "Its model was not kept: set sweep.keep_models: all and run the sweep again first."
            )
        return found

    def without_quantization(
        self, max_mb: float | None, min_retention: float | None, min_speed: float | None
    ) -> list[str]:
        """A line where the 16-bit model is itself within a limit of size, and all others."""
        model = self.data.evaluations.get(self.baseline.model) or {}
        size = number(model.get("bytes"))
        fits = max_mb is not None and size is not None and size <= max_mb * 1e6
        if not fits or (min_retention or 0) > 100 or (min_speed or 0) > 1:
            return []
        trained = self.baseline.model == "student" and self.data.spec.get("distill")
        where = f" ({self.data.url}/student)" if trained else ""
        return [
            f"No quantization is needed for this: the 16-bit {self.baseline.model} takes "
            f"{f.size(size)}{where}."
        ]

    def command(self, one: Candidate) -> str:
        """The export command: for GPUs the Hugging Face format, else gguf."""
        kind = "hf" if one.result.get("device") == "gpu" else "gguf"
        out = f"{self.data.name}-{one.key}-{kind}"
        run, out = shlex.quote(self.run), shlex.quote(out)
        return f"stillhouse export {run} --cell {one.key} --format {kind} --out {out}"
