"""Replaces the `auto` values of a spec by what they stand for, once, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.spec import JobSpec
from trainer.auto import auto_learning_rate, auto_micro_batch
from trainer.models import find_model, width_of


def student_config(spec: JobSpec) -> dict[str, Any]:
    """The student's raw config. Raises ValueError, one line, if there is none to be read."""
    student = spec.student
    if isinstance(student.config, dict):
        return student.config
    if student.config is not None:
        path = Path(student.config)
    else:
        assert student.model is not None
        path = find_model("student.model", student.model, student.revision) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"student.config: {path} cannot be read as JSON ({error})") from None


def resolve(spec: JobSpec) -> JobSpec:
    """The spec with `auto` resolved in `data` and `distill`; resources are left to the cluster."""
    if spec.distill is None:
        return spec
    assert spec.data is not None
    distill, data = spec.distill, spec.data
    changes: dict[str, Any] = {}
    if distill.micro_batch == "auto":
        changes["micro_batch"] = auto_micro_batch(data.sequence_length)
    if distill.learning_rate == "auto":
        width = width_of(student_config(spec))
        changes["learning_rate"] = auto_learning_rate(spec.student.init, width)
    update: dict[str, Any] = {"distill": distill.model_copy(update=changes)}
    if data.max_tokens == "auto":
        tokens = distill.steps * distill.tokens_per_step
        update["data"] = data.model_copy(update={"max_tokens": tokens})
    return spec.model_copy(update=update)
