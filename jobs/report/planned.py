"""The plan of a run beside what happened: a section of the page, and of table.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from jobs.report import figures as f
from jobs.report.parts import Field, note, section, table_of
from jobs.report.rows import cost
from jobs.report.source import RunData, number

TITLE = "Plan and actual"
ABOUT = (
    "Foretold before the work began, by configs and the cluster alone. Memory: of the worker that "
    "held most, over what its imports take; on a GPU what torch allocated. Only what both know is "
    "listed."
)


@dataclass(frozen=True)
class Line:
    """One quantity: as planned, as it was, and how a value is written."""

    what: str
    planned: float
    actual: float
    show: Callable[[Any], str]

    @property
    def ratio(self) -> str:
        """Actual over planned."""
        return f"{self.actual / self.planned:.2f}" if self.planned else f.NOTHING


def lines(data: RunData) -> list[Line]:
    """What the plan foretold and the run tells; [] without a plan."""
    plan = data.plan
    if not plan or "stages" not in plan:
        return []
    done = {
        str(event.get("stage")): event.get("metrics") or {} for event in data.of_kind("stage_done")
    }
    pairs = [*_cache(plan, _captured(data)), *_stages(data, plan, done), *_sizes(data, plan)]
    return [
        Line(what, planned, actual, show)
        for what, before, after, show in pairs
        if (planned := number(before)) is not None and (actual := number(after)) is not None
    ]


Pair = tuple[str, Any, Any, Callable[[Any], str]]


def _captured(data: RunData) -> Mapping[str, Any]:
    """The metrics of the last capture that added records."""
    for event in reversed(data.of_kind("capture_done")):
        if (event.get("metrics") or {}).get("sequences"):
            return dict(event["metrics"])
    return {}


def _cache(plan: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[Pair]:
    cache = plan["storage"].get("cache", {})
    rates = metrics.get("bytes_per_token") or {}
    pairs: list[Pair] = [
        ("Cache, bytes per token", cache.get("train_bytes_per_token"), rates.get("train"), f.plain),
        (
            "Cache, bytes per held-out token",
            cache.get("held_out_bytes_per_token"),
            rates.get("eval"),
            f.plain,
        ),
    ]
    # What others had captured before is in no figure of this run.
    if not metrics.get("present"):
        tokens = plan["stages"].get("capture", {}).get("tokens")
        pairs.append(("Captured tokens", tokens, metrics.get("tokens"), f.whole))
        pairs.append(("Cache", cache.get("bytes"), metrics.get("bytes"), f.size))
    return pairs


def _stages(
    data: RunData, plan: Mapping[str, Any], done: Mapping[str, Mapping[str, Any]]
) -> list[Pair]:
    """Time, device time and memory of each stage that ran."""
    spent = {stage.stage: stage for stage in cost(data)}
    pairs: list[Pair] = []
    for name, stage in plan["stages"].items():
        if name not in spent:
            continue
        title = name.capitalize()
        # A capture that had nothing to do says nothing of one that has.
        worked = name != "capture" or done.get(name, {}).get("sequences")
        if worked:
            pairs.append((f"{title}, time", stage.get("seconds"), spent[name].seconds, f.duration))
            hours = stage.get("device_hours") if stage.get("device") == spent[name].device else None
            show = _device_time(spent[name].device)
            pairs.append((f"{title}, device time", hours, spent[name].hours, show))
        total = (stage.get("memory") or {}).get("total")
        pairs.append((f"{title}, memory per worker", total, _peak(data, name), f.size))
    return pairs


def _peak(data: RunData, stage: str) -> float | None:
    """The most that a worker of a stage held, of its last end that says so."""
    ends = {"capture": "capture_done", "distill": "training_done"}
    if stage not in ends:
        return None
    found = [
        number((event.get("metrics") or {}).get("peak_bytes"))
        for event in data.of_kind(ends[stage])
        if event.get("stage") == stage
    ]
    return next((value for value in reversed(found) if value is not None), None)


def _device_time(device: str) -> Callable[[Any], str]:
    return lambda hours: f.device_time(hours, device)


def _sizes(data: RunData, plan: Mapping[str, Any]) -> list[Pair]:
    sizes = plan["storage"]
    saved = [
        event.get("bytes")
        for event in data.of_kind("checkpoint")
        if event.get("stage") == "distill"
    ]
    student = data.evaluations.get("student", {})
    cells = [number(cell.get("bytes")) for cell in data.cells.values()]
    known = [size for size in cells if size is not None]
    whole = sum(known) if known and len(known) == plan.get("cells") else None
    return [
        ("A checkpoint", sizes.get("checkpoint"), saved[-1] if saved else None, f.size),
        ("Student", sizes.get("student"), student.get("bytes"), f.size),
        ("Cells", sizes.get("cells"), whole, f.size),
    ]


FIELDS = (
    Field("Planned", lambda line: line.show(line.planned)),
    Field("Actual", lambda line: line.show(line.actual)),
    Field("Actual / planned", lambda line: line.ratio),
)


def html_section(data: RunData) -> str:
    """The page's section; "" without a plan or anything to compare it with."""
    found = lines(data)
    if not found:
        return ""
    table = table_of(found, FIELDS, "Quantity", lambda line: escape(line.what))
    return section(TITLE, table, note(ABOUT))


def markdown(data: RunData) -> str:
    """The same for table.md."""
    found = lines(data)
    if not found:
        return ""
    rows = [
        f"\n## {TITLE}\n",
        "| Quantity | Planned | Actual | Actual / planned |",
        "| --- | ---: | ---: | ---: |",
    ]
    for line in found:
        shown = " | ".join(field.show(line) for field in FIELDS)
        rows.append(f"| {line.what} | {shown} |")
    return "\n".join([*rows, "", ABOUT]) + "\n"
