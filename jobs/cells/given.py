"""What a sweep is given beside its models: models quantized elsewhere, and benchmark tasks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jobs.spec import JobSpec
from quant.spec import ExtraModel, Task
from trainer.models.load import absolute, find_model, identity


def absolute_paths(spec: JobSpec) -> JobSpec:
    """The spec with its extra models and task folders named absolutely: workers run elsewhere."""
    sweep = spec.sweep
    if sweep is None or not (sweep.extra or sweep.tasks):
        return spec
    extra = [item.model_copy(update={"path": absolute(item.path)}) for item in sweep.extra]
    # The label is made of the path as it was written.
    extra = [
        item.model_copy(update={"name": before.label})
        for item, before in zip(extra, sweep.extra, strict=True)
    ]
    tasks = [
        task.model_copy(update={"folder": absolute(task.folder)}) if task.folder else task
        for task in sweep.tasks
    ]
    return spec.model_copy(
        update={"sweep": sweep.model_copy(update={"extra": extra, "tasks": tasks})}
    )


def extra_identity(extra: ExtraModel) -> dict[str, Any]:
    """What an extra model is: its name, and hashes of its config and weights.

    Raises ValueError, one line, if it is not there.
    """
    return {**identity(find_model("sweep.extra", extra.path), extra.path), "label": extra.label}


def task_identity(task: Task) -> dict[str, Any]:
    """A benchmark task: its settings, and the contents of its folder in the place of its name."""
    found = task.model_dump(exclude={"folder"})
    if task.folder is not None:
        digest = hashlib.blake2b(digest_size=16)
        root = Path(task.folder)
        for path in sorted(root.rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0")
                digest.update(path.read_bytes())
        found["content"] = digest.hexdigest()
    return found
