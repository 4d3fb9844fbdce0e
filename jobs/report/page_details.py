"""The page's details: quality with intervals, cost, and the forecast against what happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from jobs.report import formats as f
from jobs.report import table
from jobs.report.page_parts import (
    Field,
    heading,
    named,
    note,
    section,
    simple_table,
    table_of,
    titles,
)
from jobs.report.rows import Row, cost
from jobs.report.run_data import RunData, number

QUALITY = (
    Field("KL to 16-bit", lambda row: f.ranged(row, own_kl(row))),
    Field("99 %", lambda row: f.plain(row.get(own_kl(row) + "_p99"), 2)),
    Field("Max", lambda row: f.plain(row.get(own_kl(row) + "_max"), 2)),
    Field("KL to teacher", lambda row: f.ranged(row, "kl_to_teacher")),
    Field("Same top-1", lambda row: f.share(row["top1_agreement"])),
    Field("Accuracy, %", lambda row: f.ranged(row, "accuracy", 1, 100) if _has(row) else f.NOTHING),
    Field("Perplexity ratio", lambda row: f.ranged(row, "perplexity_ratio", 3)),
    Field("True token", lambda row: f.change(row["true_prob_change"])),
    Field("RMS", lambda row: f.points(row["true_prob_change_rms"])),
    Field("Tokens", lambda row: f.fixed(row["tokens"], 0)),
)
COST = (
    Field("Weights", lambda row: f.count(row["parameters"])),
    Field("Prefill", lambda row: f.speed(row["prefill_tokens_per_s"])),
    Field("Decode", lambda row: f.speed(row["decode_tokens_per_s"])),
    Field("Energy per token", f.energy),
    Field("In memory", lambda row: f.size(row["resident_bytes"])),
    Field("Peak", lambda row: f.size(row["peak_memory_bytes"])),
    Field("Evaluation's peak", lambda row: f.size(row["eval_peak_bytes"])),
    Field("KL of kernel", lambda row: f.plain(row["kernel_kl"], 2)),
    Field("Quantize", lambda row: f.duration(row["quantize_s"])),
    Field("Evaluate", lambda row: f.duration(row["eval_s"])),
    Field("Whole cell", lambda row: f.duration(row["cell_s"])),
)
NOTES = {
    "KL to 16-bit": "KL to 16-bit: to the model that a cell is made of, exact, in nats per token "
    "over the report part; in brackets 95 % intervals over sequences.",
    "99 %": "99 %, Max: of it, over tokens.",
    "KL to teacher": "KL to teacher: coarsened to the teacher's records, a lower bound; exact for "
    "the teacher's own cells.",
    "Same top-1": "Same top-1: how often the most likely next token is that of the 16-bit model it "
    "is made of (for the student and the control: the teacher's).",
    "Perplexity ratio": "Perplexity ratio: to the 16-bit model's, paired.",
    "True token": "True token: mean change of its probability, and RMS over tokens, in "
    "percentage points.",
    "In memory": "In memory: the weights as their kernels hold them.",
    "Peak": "Peak: while it generates.",
    "KL of kernel": "KL of kernel: how far its answers are from those of the dequantized weights.",
    "Whole cell": "Whole cell: loading, quantizing, recovering, evaluating and saving.",
}


def own_kl(row: Row) -> str:
    """The key of a row's KL to the 16-bit model that it is made of."""
    return f"kl_to_{row['of'] or ('student' if row['role'] == 'extra' else '')}"


def _has(row: Row) -> bool:
    return row["accuracy_low"] is not None  # the headline table has it without


def detail(rows: list[Row]) -> str:
    """The section of all rows that did not fail."""
    measured = [row for row in rows if row["status"] != table.FAILED]
    if not measured:
        return ""
    evaluated = {str(row["evaluated_with"]) for row in measured if row["evaluated_with"]}
    there = titles(measured, QUALITY)
    quality = " ".join(text for title, text in NOTES.items() if title in there)
    if evaluated:
        quality += f" Quality was evaluated with {' or '.join(sorted(evaluated))}."
    there = titles(measured, COST)
    cost = " ".join(text for title, text in NOTES.items() if title in there)
    devices = sorted({str(row["device_name"]) for row in measured if row["device_name"]})
    if devices:
        cost += f" Speeds were measured on {' and '.join(devices)}"
        cost += "; do not compare those of different devices." if len(devices) > 1 else "."
    energy = sorted({str(row["energy_note"]) for row in measured if row["energy_note"]})
    cost += f" Energy: {'; '.join(energy)}." if energy else ""
    return section(
        "In detail",
        table_of(measured, QUALITY, "Quality", named),
        note(quality.strip()),
        table_of(measured, COST, "Size, speed, cost", named) if there else "",
        note(cost.strip()),
        _kernels(measured),
    )


def _kernels(rows: list[Row]) -> str:
    """Which kernels the speeds were had with; cells that had the same stand together."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get("kernel"):
            found.setdefault(str(row["kernel"]), []).append(row["key"])
    if not found:
        return ""
    head = heading("Kernel of the speeds", False) + heading("Cells", False)
    body = "".join(
        f'<tr><td class="kernel"><code>{escape(kernel)}</code></td>'
        f"<td>{escape(', '.join(keys))}</td></tr>"
        for kernel, keys in found.items()
    )
    return simple_table(head, body)


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
