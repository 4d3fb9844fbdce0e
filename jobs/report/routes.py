"""Distil, quantize, or both: the four models that a teacher can become, what each keeps and costs.

The quantized ones are those that `recommend` names without limits, of each model: they are chosen
on `select`; what they keep is of `report`. `attributions` splits the loss into what distillation
and what quantization added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.report import formats as f
from jobs.report.pareto import TEACHER, candidates, model_of, sums_of, tied
from jobs.report.recommend import recommend
from jobs.report.rows import cost
from jobs.report.run_data import RunData, number, training_metrics
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


@dataclass(frozen=True)
class Route:
    """One of the four. key: teacher, student, or a cell's.

    bytes: true bytes; accuracy: of the next token, a fraction; kl: mean KL to the teacher, nats per
    token, coarsened to its records; retention: percent of the teacher's accuracy; decode: tokens
    per second, and on which device. hours: device hours to get there, by kind of device (gpu,
    cpu); None: not recorded.
    """

    name: str
    key: str
    bytes: float | None
    accuracy: float | None
    kl: float | None
    retention: float | None
    decode: float | None
    device: str | None
    hours: dict[str, float] | None


def routes(data: RunData) -> list[Route]:
    """Teacher, quantized teacher, student, quantized student; [] unless both have such a cell."""
    teacher, student = data.evaluations.get("teacher"), data.evaluations.get("student")
    if teacher is None or student is None or not data.spec.get("distill"):
        return []
    chosen = {model: recommend(data, models=(model,)).key for model in ("teacher", "student")}
    if None in chosen.values():
        return []
    trained = training_hours(data)
    whole = number(teacher.get("accuracy"))

    def route(
        name: str, key: str, found: Mapping[str, Any], hours: dict[str, float] | None
    ) -> Route:
        accuracy = number(found.get("accuracy"))
        kept = 100 * accuracy / whole if accuracy is not None and whole else None
        kl = 0.0 if key == "teacher" else mean(found, TEACHER)
        return Route(
            name,
            key,
            number(found.get("bytes")),
            accuracy,
            number(found.get("kl_to_teacher")) if kl is None else kl,
            kept,
            number(found.get("decode_tokens_per_s")),
            found.get("device_name"),
            hours,
        )

    made = []
    for name, model, plain, before in (
        ("teacher", "teacher", teacher, {}),
        ("student", "student", student, trained),
    ):
        key = str(chosen[model])
        cell = data.cells[key]
        made.append(route(name, model, plain, before))
        made.append(route(f"quantized {name}", key, cell, _with(before, cell)))
    return made


def training_hours(data: RunData) -> dict[str, float] | None:
    """Device hours of capture and distillation, by kind; of a control run beside it none."""
    found: dict[str, float] = {}
    known = False
    for stage in cost(data):
        if stage.stage not in ("capture", "distill") or stage.hours is None:
            continue
        share = 1.0
        if stage.stage == "distill":
            known = True
            own, other = (
                number(training_metrics(data, name).get("worker_seconds"))
                for name in ("distill", "control")
            )
            share = own / (own + other) if own and other else 1.0
        found[stage.device] = found.get(stage.device, 0.0) + share * stage.hours
    return found if known else None


def _with(before: dict[str, float] | None, cell: Mapping[str, Any]) -> dict[str, float] | None:
    """The hours so far, and those of a cell."""
    own = number(cell.get("device_hours"))
    if before is None or own is None:
        return None
    kind = "gpu" if cell.get("device") == "gpu" else "cpu"
    return {**before, kind: before.get(kind, 0.0) + own}


def hours_in_words(hours: dict[str, float] | None) -> str:
    """ "3.2 GPU hours + 1.2 CPU core minutes"; "0" for a model that is given."""
    if hours is None:
        return f.NOTHING
    return (
        " + ".join(f.device_time(each, kind) for kind, each in sorted(hours.items(), reverse=True))
        or "0"
    )


def answer(data: RunData, found: list[Route]) -> str:
    """Which of the two quantized models to take, with the numbers; empty where some are missing.

    It is decided in size and KL to the teacher on select, where a tie is called one; the numbers
    told are of report, as in the table.
    """
    if len(found) != 4:
        return ""
    quantized = {route.key: route for route in (found[1], found[3])}
    known = candidates({key: data.cells[key] for key in quantized}, TEACHER)
    if len(known) != 2:
        return ""
    small, large = known  # the better first where they are of one size
    first = "Do both" if small.model == "student" else "Quantize only"
    second = "do both" if large.model == "student" else "quantize only"
    here, there = _told(quantized[small.key]), _told(quantized[large.key])
    alone = f" Distilled and not quantized it is {_told(found[2])}."
    if tied(small, large):
        return f"{first}: {here} is smaller than {there}, and they are tied in KL.{alone}"
    if small.kl < large.kl:
        return f"{first}: {here} is smaller and closer to the teacher than {there}.{alone}"
    times = f"{large.bytes / small.bytes:.1f} times smaller"
    return f"{first} for size: {here} is {times}. For closeness {second}: {there}.{alone}"


def _told(route: Route) -> str:
    """A route in words, with its size, KL and retention."""
    kept = "" if route.retention is None else f", {f.percent(route.retention)} of its accuracy"
    told = f"{f.size(route.bytes)}, KL {f.plain(route.kl)} to the teacher{kept}"
    return told if route.key == "student" else f"{route.key} ({told})"
