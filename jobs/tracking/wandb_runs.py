"""Which W&B runs a run directory amounts to, and what each holds: pure data, no wandb."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from jobs.report import formats
from jobs.report.rows import Row, losses_in_words, rows_of, technique, used_losses
from jobs.report.run_data import (
    TRAININGS,
    RunData,
    curve,
    evaluations,
    number,
    seconds_since_epoch,
    training_metrics,
)

History = list[tuple[int, dict[str, float]]]

RESULTS = (
    "bits_per_weight",
    "parameters",
    "bytes",
    "accuracy",
    "retention",
    "perplexity",
    "perplexity_ratio",
    "kl_to_student",
    "kl_to_student_low",
    "kl_to_student_high",
    "kl_to_student_p99",
    "kl_to_teacher",
    "kl_to_teacher_low",
    "kl_to_teacher_high",
    "top1_agreement",
    "true_prob_change",
    "peak_memory_bytes",
    "energy_per_token_j",
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "speedup",
    "resident_bytes",
    "kernel_kl",
    "quantize_s",
    "eval_s",
    "tokens",
)
CELLS = ("cell", "extra")  # a W&B run each
ROLE_OF = {"capture": "teacher", "distill": "student", "control": "control"}
TABLE = {  # heading -> key of the row, and what it is divided by
    "Bits": ("bits", 1),
    "True bpw": ("bits_per_weight", 1),
    "Size (MB)": ("bytes", 1e6),
    "Accuracy (%)": ("accuracy", 0.01),
    "Retention (%)": ("retention", 1),
    "Perplexity": ("perplexity", 1),
    "Decode speed (tok/s)": ("decode_tokens_per_s", 1),
    "Speed-up": ("speedup", 1),
    "KL to student": ("kl_to_student", 1),
    "KL to teacher": ("kl_to_teacher", 1),
}


@dataclass(frozen=True)
class Tracked:
    """One W&B run: `history` are (step, numbers) by rising step, `summary` its results.

    `complete` is False while its stage is still at work. `table` (headings and lines) and `html`
    are the report run's.
    """

    id: str
    key: str
    name: str
    group: str
    job_type: str
    config: dict[str, Any]
    history: History = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    failed: bool = False
    complete: bool = True
    table: tuple[list[str], list[list[Any]]] | None = None
    html: str | None = None

    @property
    def digest(self) -> str:
        """Changes whenever anything in it does."""
        return _hash(json.dumps(self.__dict__, sort_keys=True, default=str), 32)


def run_id(url: str, name: str, key: str) -> str:
    """A W&B run id in [a-z0-9] that every projection of this stage or cell comes to."""
    return _hash("\n".join((url, name, key)), 16)


def _hash(text: str, length: int) -> str:
    return hashlib.blake2b(text.encode(), digest_size=length // 2).hexdigest()


def wandb_runs(data: RunData, html: str | None = None) -> list[Tracked]:
    """The W&B runs: one per training stage that was at work, one per cell, one report.

    `html` is the report page, where there is one.
    """
    rows = rows_of(data)
    found = [_training(data, rows, stage) for stage in ("capture", *TRAININGS)]
    found += [_cell(data, rows, row) for row in rows if row["role"] in CELLS]
    if rows:
        found.append(_report(data, rows, html))
    return [tracked for tracked in found if tracked is not None]


def _config(data: RunData, rows: list[Row], key: str, cell: Row | None = None) -> dict[str, Any]:
    """Flat, and the same keys for every W&B run, so that W&B can filter and group by them."""
    spec = data.spec
    teacher, student = _section(spec, "teacher"), _section(spec, "student")
    train, cache = _section(spec, "distill"), _section(spec, "cache")
    if key == "control":
        train = {**train, "mode": "cached", "losses": {"ce": 1.0}, "temperature": None}
    how = cell["technique"] if cell else technique(spec, ROLE_OF[key]) if key in ROLE_OF else None
    named = {row["role"]: row for row in rows if row["role"] != "cell"}
    losses = used_losses(train.get("losses") or {})
    drawn = cache.get("method") == "sample"
    return {
        "run": data.name,
        "key": key,
        "teacher": named["teacher"]["name"] if "teacher" in named else teacher.get("model"),
        "teacher_params": named["teacher"]["parameters"] if "teacher" in named else None,
        "student": named["student"]["name"] if "student" in named else student.get("model"),
        "student_params": named["student"]["parameters"] if "student" in named else None,
        "technique": how,
        "method": cell.get("method") if cell else None,
        "bits": cell["bits"] if cell else None,
        "group_size": cell["group_size"] if cell else None,
        "embeddings": cell.get("embeddings") if cell else None,
        "head": cell.get("head") if cell else None,
        "made_of": cell.get("of") if cell else None,
        "recovered": bool(cell.get("recovered")) if cell else None,
        "budget_mb": cell.get("budget_mb") if cell else None,
        "kernel": cell.get("kernel") if cell else None,
        "seed": spec.get("seed"),
        "sequence_length": _section(spec, "data").get("sequence_length"),
        "cache_method": cache.get("method"),
        "cache_k": None if drawn else cache.get("k"),
        "cache_draws": cache.get("draws") if drawn else None,
        "cache_redraws": cache.get("redraws") if drawn else None,
        "mode": train.get("mode"),
        "losses": losses_in_words(losses) or None,
        "lora_r": _section(student, "lora").get("r"),
        "student_layers": student.get("layers"),
        "temperature": train.get("temperature"),
        "steps": train.get("steps"),
        "tokens_per_step": train.get("tokens_per_step"),
        "learning_rate": train.get("learning_rate"),
        "zero_stage": train.get("zero_stage"),
        "offload": train.get("offload"),
        "evaluate_steps": train.get("evaluate_steps"),
        "dtype": train.get("dtype"),
    }


def _section(spec: dict[str, Any], name: str) -> dict[str, Any]:
    section = spec.get(name)
    return section if isinstance(section, dict) else {}


def _training(data: RunData, rows: list[Row], stage: str) -> Tracked | None:
    history = _steps(data, stage)
    if not history and stage == "capture":
        history = _progress(data, stage)
    metrics = _capture_metrics(data) if stage == "capture" else training_metrics(data, stage)
    if not history and not metrics:
        return None
    row = next((row for row in rows if row["role"] == ROLE_OF[stage]), None)
    # What a model is: a cell's numbers without those that training counts under the same name.
    results = _results(row) if row else {}
    summary = {**_flat(metrics), **{k: v for k, v in results.items() if k != "tokens"}}
    failed = not metrics and (_last_failed(data, stage) or _ended(data))
    return Tracked(
        id=run_id(data.url, data.name, stage),
        key=stage,
        name=f"{data.name}/{stage}",
        group=data.name,
        job_type=stage,
        config=_config(data, rows, stage),
        history=history,
        summary=summary,
        failed=failed,
        complete=failed or (bool(metrics) and not _redone(data, stage)),
    )


def _steps(data: RunData, stage: str) -> History:
    rows: dict[int, dict[str, float]] = {}
    for event in curve(data, stage):
        numbers = {
            key: value
            for key, value in event.items()
            if key not in ("t", "attempt", "step", "steps") and number(value) is not None
        }
        rows[int(event["step"])] = {**numbers, **_timestamp(event)}
    told = evaluations(data, stage)
    for event in told:
        row = rows.setdefault(int(event["step"]), _timestamp(event))
        row |= {
            key: value
            for key, value in event.items()
            if key.startswith("select_") and number(value) is not None
        }
        row["evaluation_seconds"] = number(event.get("seconds")) or 0.0
    history = sorted(rows.items())
    # W&B takes no more of a step that it has: the newest waits for its evaluation.
    every = number(_section(data.spec, "distill").get("evaluate_steps"))
    newest = history[-1][0] if history else 0
    waits = bool(every) and newest % (every or 1) == 0 and newest not in [e["step"] for e in told]
    return history[:-1] if waits and not _is_over(data, stage) else history


def _is_over(data: RunData, stage: str) -> bool:
    return _ended(data) or (bool(training_metrics(data, stage)) and not _redone(data, stage))


def _progress(data: RunData, stage: str) -> History:
    """Progress as history: the step is what is done, with the throughput since the last one."""
    rows: dict[int, dict[str, float]] = {}
    before: tuple[float, float] | None = None
    for event in data.of_kind("progress"):
        done, when = number(event.get("done")), seconds_since_epoch(event)
        if event.get("stage") != stage or done is None:
            continue
        row = {"done": done, **_timestamp(event)}
        if (total := number(event.get("total"))) is not None:
            row["total"] = total
        if before and when is not None and when > before[1] and done > before[0]:
            row[f"{event.get('unit') or 'items'}_per_s"] = (done - before[0]) / (when - before[1])
        if before is None or done != before[0]:  # what is not whole yet comes in between
            before = (done, when) if when is not None else None
        rows[int(done)] = row
    return sorted(rows.items())


def _timestamp(event: dict[str, Any]) -> dict[str, float]:
    """W&B's own key for when a row was logged: when it happened, not when it was projected."""
    when = seconds_since_epoch(event)
    return {} if when is None else {"_timestamp": when}


def _capture_metrics(data: RunData) -> dict[str, Any]:
    done = data.of_kind("capture_done")
    return dict(done[-1].get("metrics") or {"done": True}) if done else {}


def _redone(data: RunData, stage: str) -> bool:
    """Whether training went on after the closing numbers: an earlier attempt's, then."""
    kinds = [
        event["event"]
        for event in data.of_kind("step", "training_done")
        if event.get("stage") == stage
    ]
    return bool(kinds) and kinds[-1] == "step" and "training_done" in kinds


def _last_failed(data: RunData, stage: str) -> bool:
    stage = "capture" if stage == "capture" else "distill"  # which trains the control too
    ends = [e for e in data.of_kind("stage_done", "stage_failed") if e.get("stage") == stage]
    return bool(ends) and ends[-1]["event"] == "stage_failed"


def _ended(data: RunData) -> bool:
    """Whether the newest attempt is over."""
    newest = max((event.get("attempt") or 0 for event in data.events), default=0)
    return any((event.get("attempt") or 0) == newest for event in data.of_kind("run_end"))


def _cell(data: RunData, rows: list[Row], row: Row) -> Tracked:
    failed = row["status"] == "failed"
    summary = {"status": row["status"], **_results(row)}
    if row["error"]:
        summary["error"] = formats.first_line(row["error"])
    return Tracked(
        id=run_id(data.url, data.name, row["key"]),
        key=row["key"],
        name=f"{data.name}/{row['key']}",
        group=data.name,
        job_type="cell",
        config=_config(data, rows, row["key"], row),
        summary=summary,
        failed=failed,
    )


def _results(row: Row) -> dict[str, Any]:
    found = {key: row[key] for key in RESULTS if row.get(key) is not None}
    for name, task in (row.get("tasks") or {}).items():
        if number(task.get("accuracy")) is not None:
            found[f"task_{name}_accuracy"] = task["accuracy"]
    for name, version in _flat(row.get("versions") or {}).items():
        found[f"version_{name}"] = version
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested numbers and texts under joined names; what is None is left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{key}_"))
        elif isinstance(value, str | bool) or number(value) is not None:
            found[f"{prefix}{key}"] = value
    return found


def _report(data: RunData, rows: list[Row], html: str | None) -> Tracked:
    lines = []
    for row in rows:
        line = [row["model"], row["technique"], row["status"]]
        for key, unit in TABLE.values():
            value = number(row[key])
            line.append(None if value is None else value / unit)
        lines.append(line)
    cells = [row for row in rows if row["role"] in CELLS]
    failed = sum(row["status"] == "failed" for row in cells)
    return Tracked(
        id=run_id(data.url, data.name, "report"),
        key="report",
        name=f"{data.name}/report",
        group=data.name,
        job_type="report",
        config=_config(data, rows, "report"),
        summary={
            "headline_sentence": formats.headline(rows),
            "cells": len(cells),
            "failed_cells": failed,
        },
        complete=_ended(data),
        table=(["Model", "Technique", "Status", *TABLE], lines),
        html=html,
    )
