"""What the trainer's sections of a spec ask for: the captures and trainings, and their names.

Shared by all launchers, so a job that one of them began is continued by another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cluster.storage import Store
from trainer.auto import auto_learning_rate, auto_micro_batch
from trainer.fingerprint import fingerprint, flatten
from trainer.identity import Identities
from trainer.models import absolute, find_model, width_of
from trainer.spec import (
    CacheSpec,
    DataSpec,
    DistillSpec,
    StudentSpec,
    TeacherSpec,
    TokenizerSpec,
)

# Folders below the storage that all runs share.
CORPORA, CACHES = "_corpora", "_logits"
# Keys of `distill` that change how a training runs, not what comes out of it.
_RUNNING = {"checkpoint_minutes", "checkpoint_steps", "keep_checkpoints", "control"}


class Sections(Protocol):
    """The sections of a spec that the trainer reads."""

    @property
    def seed(self) -> int: ...
    @property
    def teacher(self) -> TeacherSpec | None: ...
    @property
    def student(self) -> StudentSpec: ...
    @property
    def tokenizer(self) -> TokenizerSpec | None: ...
    @property
    def data(self) -> DataSpec | None: ...
    @property
    def cache(self) -> CacheSpec: ...
    @property
    def distill(self) -> DistillSpec | None: ...
    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Any: ...


Spec = TypeVar("Spec", bound=Sections)


def resolve(spec: Spec) -> Spec:
    """The spec with local models named absolutely and `auto` resolved in `data` and `distill`.

    Workers run in directories of their own, so a relative name would mean nothing there. Raises
    ValueError, one line, if the student's config cannot be read.
    """
    spec = _absolute(spec)
    distill, data = spec.distill, spec.data
    if distill is None:
        return spec
    assert data is not None
    changes: dict[str, Any] = {}
    if distill.micro_batch == "auto":
        changes["micro_batch"] = auto_micro_batch(data.sequence_length)
    if distill.learning_rate == "auto":
        width = width_of(_raw_config(spec.student))
        changes["learning_rate"] = auto_learning_rate(spec.student.init, width)
    update: dict[str, Any] = {"distill": distill.model_copy(update=changes)}
    if data.max_tokens == "auto":
        tokens = distill.steps * distill.tokens_per_step
        update["data"] = data.model_copy(update={"max_tokens": tokens})
    return spec.model_copy(update=update)


def _absolute(spec: Spec) -> Spec:
    update: dict[str, Any] = {}
    if spec.teacher is not None:
        model = absolute(spec.teacher.model)
        update["teacher"] = spec.teacher.model_copy(update={"model": model})
    student: dict[str, Any] = {}
    if spec.student.model is not None:
        student["model"] = absolute(spec.student.model)
    if isinstance(spec.student.config, str):
        student["config"] = absolute(spec.student.config)
    update["student"] = spec.student.model_copy(update=student)
    return spec.model_copy(update=update)


def _raw_config(student: StudentSpec) -> dict[str, Any]:
    """The student's config as it is written."""
    if isinstance(student.config, dict):
        return student.config
    if student.config is not None:
        path = Path(student.config)
    else:
        assert student.model is not None
        path = (
            find_model("student.model", student.model, student.revision, weights=False)
            / "config.json"
        )
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"student.config: {path} cannot be read as JSON ({error})") from None


def identities(spec: Sections) -> Identities:
    """The identities of this spec's parts."""
    assert spec.data is not None
    return Identities(spec.teacher, spec.student, spec.tokenizer, spec.data, spec.cache)


def schedule_inputs(spec: Sections) -> dict[str, Any]:
    """What decides which sequences are read, and when; flat."""
    if spec.distill is None or spec.data is None:
        return {}
    return {
        "distill.steps": spec.distill.steps,
        "distill.tokens_per_step": spec.distill.tokens_per_step,
        "data.max_tokens": spec.data.max_tokens,
        **flatten([source.weight for source in spec.data.train], "weights"),
        "seed": spec.seed,
    }


def draws_inputs(spec: Sections) -> dict[str, Any]:
    """How many sets of draws are read, which may grow and is in no cache's identity; flat."""
    return {"cache.redraws": spec.cache.redraws} if spec.cache.method == "sample" else {}


def training_inputs(
    spec: Sections, student: Mapping[str, Any], corpus: str, cache: str | None
) -> dict[str, Any]:
    """What the trained weights depend on; flat.

    student: what it starts from (`Identities.student`); corpus, cache: the names of their folders.
    """
    assert spec.distill is not None
    inputs = flatten(spec.distill.model_dump(exclude=_RUNNING), "distill")
    inputs |= flatten(dict(student), "student")
    inputs |= schedule_inputs(spec)
    inputs["corpus"] = corpus
    if spec.teacher is not None:
        inputs["cache"] = cache
        inputs |= draws_inputs(spec)
    return inputs


def make_capture(
    spec: Sections, corpus: Store, cache: Store, *, batch_tokens: int, shard_seconds: float
) -> Any:
    """The `trainer.teacher.Capture` of a resolved spec with a teacher."""
    from trainer.teacher import Capture

    assert spec.data is not None and spec.teacher is not None
    return Capture(
        teacher=spec.teacher,
        cache_spec=spec.cache,
        data=spec.data,
        distill=spec.distill,
        seed=spec.seed,
        batch_tokens=batch_tokens,
        shard_seconds=shard_seconds,
        corpus=corpus,
        cache=cache,
    )


def make_trainings(
    spec: Sections, inputs: Mapping[str, Any], run: Store, corpus: Store, cache: Store | None
) -> list[Any]:
    """The `trainer.loop.Training`s of a resolved spec: the student's, then the control's.

    Checkpoints are kept apart by what the weights depend on, `inputs` (`training_inputs`).
    """
    from trainer.loop import Training

    assert spec.distill is not None and spec.data is not None
    jobs = []
    for stage, role, losses in (
        ("distill", "student", spec.distill.losses),
        ("control", "control", {"ce": 1.0}),
    ):
        if stage == "control" and not spec.distill.control:
            continue
        name = f"{stage}-{fingerprint({**inputs, 'losses': losses})[:12]}"
        jobs.append(
            Training(
                stage=stage,
                student=spec.student,
                distill=spec.distill.model_copy(update={"losses": losses}),
                data=spec.data,
                cache_spec=spec.cache,
                seed=spec.seed,
                corpus=corpus,
                cache=cache,
                checkpoints=run.sub("checkpoints", name),
                output=run.sub(role),
            )
        )
    return jobs
