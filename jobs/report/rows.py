"""One row per model of a run: what `report/results.json` holds and every table is drawn from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cluster.storage import Store
from jobs.report.run_data import ROLES, RunData, load_run, number
from quant.grid import RECOVERED
from quant.quant_spec import CHANNEL, DYNAMIC, METHODS

Row = dict[str, Any]

NUMBERS = (
    "bits",
    "bits_per_weight",
    "parameters",
    "bytes",
    "accuracy",
    "retention",
    "nll",
    "perplexity",
    "perplexity_ratio",
    "kl_to_student",
    "kl_to_teacher",
    "top1_agreement",
    "true_prob_change",
    "true_prob_change_rms",
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "speedup",
    "resident_bytes",
    "kernel_kl",
    "peak_memory_bytes",
    "eval_peak_bytes",
    "energy_per_token_j",
    "quantize_s",
    "eval_s",
    "cell_s",
    "device_hours",
    "budget_mb",
    "tokens",
    *(
        f"{name}{end}"
        for name in ("accuracy", "perplexity_ratio", "true_prob_change")
        for end in ("_low", "_high")
    ),
    *(
        f"kl_to_{model}{end}"
        for model in ("student", "teacher")
        for end in ("_low", "_high", "_p99", "_max")
    ),
)
OTHERS = (
    *("method", "embeddings", "head", "layers", "recovered", "tasks", "kernel", "device_name"),
    *("baseline_dtype", "energy_note", "compute_dtype", "evaluated_with", "versions"),
    "fingerprint",
)
# Sums of every sequence stay in the results of the cells: a row is what tables are drawn from.
LEFT_OUT = ("per_sequence", "select")
CELLS = ("cell", "extra")  # roles of what is compared with a 16-bit model beside it


def collect(run: Store) -> list[Row]:
    """The rows of one run: teacher, student, control, then the cells by falling bits, the
    student's before the teacher's, allocated ones last, and then models quantized elsewhere.

    Every row has the same keys, cells also `spec` (see `NUMBERS`; what is not known is None):
    `of` is the 16-bit model that a cell is made of (student, teacher) and None of others,
    group_size is a number of weights or "channel", bits of an allocated cell is None, sizes are in
    bytes, accuracies fractions, retention in percent, KL in nats per token, speeds in tokens per
    second. A failed cell is a row with status "failed" and its error.
    Raises ValueError where the folder holds no run.
    """
    return rows_of(load_run(run))


def compare(runs: list[Store]) -> list[Row]:
    """The rows of several runs one after the other; their `run` key tells them apart."""
    return [row for run in runs for row in collect(run)]


def rows_of(data: RunData) -> list[Row]:
    """`collect` for a run that was read already."""
    rows = [_model_row(data, role) for role in ROLES if role in data.evaluations]
    cells = [_cell_row(data, key) for key in data.cells]
    extra = [_extra_row(data, name) for name in data.extra]
    return rows + sorted(cells, key=_place) + extra


def _place(row: Row) -> tuple[Any, ...]:
    """Cells by falling bits, then by method, then from fine to coarse groups; of the same codes the
    plain one first. Allocated ones by falling size."""
    method = METHODS.index(row["method"]) if row["method"] in METHODS else len(METHODS)
    size = math.inf if row["group_size"] == CHANNEL else number(row["group_size"]) or 0
    return (
        row["of"] != "student",
        row["budget_mb"] is not None,
        -(row["budget_mb"] or row["bits"] or 0),
        method,
        size,
        row["key"].removesuffix(RECOVERED),
        is_recovered(row),
    )


def is_recovered(row: Row) -> bool:
    """Whether a cell is one whose scales were trained; also of one that failed."""
    return bool(row.get("recovered")) or str(row["key"]).endswith(RECOVERED)


def is_allocated(row: Row) -> bool:
    """Whether a cell's bits were chosen layer by layer; also of one that failed."""
    return row.get("budget_mb") is not None


def widths(row: Row) -> str:
    """Code widths of a row in words: "4"; of an allocated cell the narrowest and the widest."""
    if not is_allocated(row):
        return "" if row["bits"] is None else f"{row['bits']:g}"
    layers = row["layers"] if isinstance(row.get("layers"), dict) else {}
    bits = sorted({16 if found is None else found["bits"] for found in layers.values()})
    return "" if not bits else f"{bits[0]}" if len(bits) == 1 else f"{bits[0]}–{bits[-1]}"


def _model_row(data: RunData, role: str) -> Row:
    found = data.evaluations[role]
    row = _row(data, role, found)
    row["model"] = row["name"] = str(found.get("name") or _model_name(data, role))
    row["technique"] = technique(data.spec, role)
    row["key"] = role
    if row["bits_per_weight"] is None and row["bytes"] and row["parameters"]:
        row["bits_per_weight"] = 8 * row["bytes"] / row["parameters"]
    if row["bits"] is None and row["bits_per_weight"] is not None:
        row["bits"] = min((16, 32), key=lambda width: abs(width - row["bits_per_weight"]))
    if role == "student" and row["speedup"] is None and row["decode_tokens_per_s"]:
        row["speedup"] = 1.0  # the cells' speed-ups are against this model
    return row


def _cell_row(data: RunData, key: str) -> Row:
    found = data.cells[key]
    row = _row(data, "cell", {**(found.get("spec") or {}), **found})
    row["of"] = str(found.get("model") or "student")
    model = data.evaluations.get(row["of"]) or {}
    row["key"] = row["name"] = key
    row["model"] = str(model.get("name") or _model_name(data, row["of"]))
    if is_allocated(row):
        row["bits"] = row["group_size"] = None
    row["technique"] = technique(data.spec, "cell", row)
    return row


def _extra_row(data: RunData, name: str) -> Row:
    found = data.extra[name]
    row = _row(data, "extra", found)
    row["key"] = f"extra-{name}"
    row["model"] = row["name"] = name
    row["technique"] = str(found.get("technique") or "quantized elsewhere")
    return row


def _row(data: RunData, role: str, found: dict[str, Any]) -> Row:
    row: Row = {"run": data.name, "role": role, "key": "", "name": "", "model": "", "technique": ""}
    row["status"] = str(found.get("status") or "done")
    row["error"] = str(found["error"]) if found.get("error") else None
    row["of"] = None
    for name in NUMBERS:
        value = found.get(name)
        row[name] = value if number(value) is not None else None
    size = found.get("group_size")
    row["group_size"] = size if size == CHANNEL or number(size) is not None else None
    row.update({name: found.get(name) for name in OTHERS})
    row["tasks"] = _tasks(found.get("tasks"))
    left_out = {*row, *LEFT_OUT}
    row.update({key: value for key, value in found.items() if key not in left_out})
    row["role"] = role
    return row


def _tasks(tasks: Any) -> Any:  # noqa: ANN401
    """Results of benchmark tasks without what they say of every document."""
    if not isinstance(tasks, dict):
        return None
    return {
        name: {key: value for key, value in task.items() if key not in ("doc_hashes", "correct")}
        for name, task in tasks.items()
        if isinstance(task, dict)
    }


def _model_name(data: RunData, role: str) -> str:
    section = data.spec.get("teacher" if role == "teacher" else "student") or {}
    if section.get("model"):
        return str(section["model"])
    config = section.get("config")
    kind = config.get("model_type") if isinstance(config, dict) else config
    return str(kind or role)


def technique(spec: dict[str, Any], role: str, cell: Row | None = None) -> str:
    """How a model came to be, in words, e.g. "distilled online (jsd 0.9 + ce 0.1), LoRA r 16"."""
    if role == "teacher":
        return "teacher"
    if role == "control":
        return f"cross-entropy only (control){_start_in_words(spec)}"
    if cell is not None:
        return _cell_in_words(cell)
    distill = spec.get("distill")
    if not distill:
        return "as given (not trained here)"
    answers = " from answers" if distill.get("mode") == "responses" else ""
    losses = used_losses(distill.get("losses") or {})
    if set(losses) <= {"ce"}:
        return f"cross-entropy{answers}{_start_in_words(spec)}"
    online = " online" if distill.get("mode") == "online" else ""
    return f"distilled{online}{answers} ({losses_in_words(losses)}){_start_in_words(spec)}"


def _cell_in_words(cell: Row) -> str:
    """E.g. "hqq 4-bit g64", "rtn 4-bit per channel, embeddings and head too", "hqq 2-bit g64,
    recovered (200 steps)", "allocated layer by layer, 0.7 MB"."""
    if is_allocated(cell):
        return f"allocated layer by layer, {cell['budget_mb']:g} MB{in_words(too(cell))}"
    bits, size, method = cell.get("bits"), cell.get("group_size"), cell.get("method")
    words = [str(method or "quantized")]
    words += [f"{bits}-bit"] if bits is not None and method != DYNAMIC else []
    words += ["per channel" if size == CHANNEL else f"g{size}"] if size is not None else []
    text = " ".join(words)
    if is_recovered(cell):
        how = cell.get("recovered")
        steps = number(how.get("steps")) if isinstance(how, dict) else None
        text += ", recovered" + (f" ({steps:g} steps)" if steps is not None else "")
    return text + in_words(too(cell))


def too(cell: Row) -> list[str]:
    """Of the embeddings and the head, what the cell has quantized beside its linear layers."""
    return [name for name in ("embeddings", "head") if cell.get(name)]


def in_words(parts: list[str]) -> str:
    """How a technique ends that has these parts quantized too."""
    return f", {' and '.join(parts)} too" if parts else ""


def _start_in_words(spec: dict[str, Any]) -> str:
    """What of the student is its teacher's, and what of it alone was trained."""
    student = spec.get("student") or {}
    is_slice = student.get("init") == "slice"
    words = f", slice of {student['layers']} of the teacher's layers" if is_slice else ""
    lora = student.get("lora")
    return f"{words}, LoRA r {lora.get('r')}" if isinstance(lora, dict) else words


def used_losses(losses: dict[str, Any]) -> dict[str, Any]:
    """The losses of a spec whose weight ever is above 0."""
    return {name: loss for name, loss in losses.items() if max(_weights(loss)) > 0}


def losses_in_words(losses: dict[str, Any]) -> str:
    """Losses by falling weight, e.g. "forward_kl 0.9 + ce 0.1"; one alone without its weight.

    A loss is its weight, or {weight, ...}; a weight may be {start, end, until, shape}. Of what else
    a loss says the numbers are told: "jsd (beta 0.3) 0.5 + ce 1 to 0".
    """
    falling = sorted(losses.items(), key=lambda item: (-max(_weights(item[1])), item[0]))
    return " + ".join(_loss_in_words(name, loss, len(losses) == 1) for name, loss in falling)


def _loss_in_words(name: str, loss: object, alone: bool) -> str:
    settings = loss if isinstance(loss, dict) else {}
    told = [
        f"{key} {value:g}" if number(value) is not None else str(value)
        for key, value in settings.items()
        if key in ("alpha", "beta", "metric")
    ]
    words = name + (f" ({', '.join(told)})" if told else "")
    start, end = _weights(loss)
    if start != end:
        return f"{words} {start:g} to {end:g}"
    return words if alone else f"{words} {start:g}"


def _weights(loss: object) -> tuple[float, float]:
    """The first and the last weight of a loss."""
    weight = loss.get("weight", 1.0) if isinstance(loss, dict) else loss
    if isinstance(weight, dict):
        return number(weight.get("start")) or 0.0, number(weight.get("end")) or 0.0
    return number(weight) or 0.0, number(weight) or 0.0


@dataclass(frozen=True)
class StageCost:
    """What one stage took: `seconds` of wall time, `hours` of devices, and of which kind."""

    stage: str
    seconds: float
    hours: float | None
    device: str  # gpu | cpu


def cost(data: RunData) -> list[StageCost]:
    """Cost of every stage in the order they first ended, summed over attempts and redos.

    From stage_done events: `seconds`, `metrics.device_hours` (GPU hours or CPU core hours) and
    `metrics.device` ("gpu" or "cpu"; cpu where it is not given). A skipped stage costs nothing.
    """
    stages: dict[str, StageCost] = {}
    for event in data.of_kind("stage_done", "stage_failed"):
        metrics = event.get("metrics") or {}
        name = str(event.get("stage"))
        before = stages.get(name, StageCost(name, 0.0, None, "cpu"))
        seconds = before.seconds + (number(event.get("seconds")) or 0.0)
        hours = number(metrics.get("device_hours"))
        device = before.device
        if hours is not None:
            device = (
                "gpu" if str(metrics.get("device", "cpu")).startswith(("gpu", "cuda")) else "cpu"
            )
            hours += before.hours or 0.0
        stages[name] = StageCost(name, seconds, before.hours if hours is None else hours, device)
    return list(stages.values())
