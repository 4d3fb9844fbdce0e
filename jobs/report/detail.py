"""The page's tables of everything else that was measured: quality with intervals, then cost."""

from __future__ import annotations

from html import escape

from jobs.report import figures as f
from jobs.report import table
from jobs.report.parts import Field, heading, named, note, section, simple_table, table_of, titles
from jobs.report.rows import Row

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
