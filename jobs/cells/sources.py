"""The 16-bit models of a run: what cells are made of, and what is measured beside them."""

from __future__ import annotations

from typing import Any

from jobs.cells.material import Source
from jobs.cells.prints import reference_folder
from jobs.stages.base import Context


def sources_of(context: Context) -> dict[str, Source]:
    """The student, and as far as the run has them the control and the teacher, by role."""
    spec = context.spec
    trained = context.outputs.get("distill", {})
    given = context.inputs.identities
    student: Any = trained.get("student") or given.student
    models: dict[str, tuple[Any, str, str, Any]] = {}
    if spec.distill is not None:
        store = context.run.store
        models["student"] = (store.sub("student"), "main", spec.name, student)
        if "control" in trained:
            name = f"{spec.name} (control)"
            models["control"] = (store.sub("control"), "main", name, trained["control"])
    else:
        model = str(spec.student.model)
        models["student"] = (model, spec.student.revision, label(model), student)
    if spec.teacher is not None:
        model = spec.teacher.model
        models["teacher"] = (model, spec.teacher.revision, label(model), given.teacher)
    return {
        role: Source(role, *told, reference_folder(role, spec, told[-1], context.outputs))
        for role, told in models.items()
    }


def label(model: str) -> str:
    """How a table calls a model: a hub id as it is, a folder by its last telling name."""
    parts = [part for part in model.replace("\\", "/").split("/") if part]
    if not model.startswith("/") and "://" not in model:
        return model
    return parts[-2] if len(parts) > 1 and parts[-1] in ("student", "control") else parts[-1]
