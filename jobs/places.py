"""Everything that a spec names by a model's name or a path, with the key that names it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jobs.spec import JobSpec
from trainer.corpus.files import is_local
from trainer.spec.sections import AnswersFile


def models(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Key and name of every model: hub ids, URLs and folders."""
    if spec.teacher is not None:
        yield "teacher.model", spec.teacher.model
    if spec.student.model is not None:
        yield "student.model", spec.student.model
    for number, extra in enumerate(spec.sweep.extra if spec.sweep else ()):
        yield f"sweep.extra.{number}.path", extra.path


def sources(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Key and path, or glob, of every source that is neither built in nor on the hub."""
    for number, source in enumerate(spec.data.train if spec.data else ()):
        if not source.source.startswith("builtin:") and is_local(source.source):
            yield f"data.train.{number}.source", source.source


def others(spec: JobSpec) -> Iterator[tuple[str, str, str]]:
    """Key and path of other files and folders, and what may stand there instead."""
    if isinstance(spec.student.config, str):
        yield "student.config", spec.student.config, "the values themselves"
    if spec.responses and isinstance(spec.responses.origin, AnswersFile):
        yield "responses.from.file", spec.responses.origin.file, ""
    for number, task in enumerate(spec.sweep.tasks if spec.sweep else ()):
        if task.folder is not None:
            yield f"sweep.tasks.{number}.folder", task.folder, "a task of lm-eval"


def is_folder(model: str) -> bool:
    """As `trainer.models.load.find_model` tells a folder from a hub id or a URL."""
    if "://" in model:
        return False
    rooted = model.startswith((".", "/", "~"))
    return rooted or model.count("/") != 1 or Path(model).expanduser().is_dir()
