"""`JobSpec`: the YAML file a user writes, one job. Each package owns its sections; this joins them.

Paths in a spec (data sources, model folders, `student.config`, `storage`) are relative to the
directory in which the command is run, not to the file. `named_models`, `named_sources` and
`named_files` list what a spec names, with its keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from cluster.spec import ResourcesSpec
from cluster.storage.section import Section
from quant.spec import SweepSpec
from trainer.corpus.files import is_local
from trainer.spec.responses import AnswersFile, ResponsesSpec
from trainer.spec.rules import NAME, Rule, faults_of, is_hub_id, plain_name, raise_faults
from trainer.spec.rules import RULES as TRAINER_RULES
from trainer.spec.sections import (
    CacheSpec,
    DataSpec,
    DistillSpec,
    StudentSpec,
    TeacherSpec,
    TokenizerSpec,
)

__all__ = ["NAME", "JobSpec", "TrackingSpec", "is_hub_id", "rule_faults"]


class TrackingSpec(Section):
    """Weights & Biases. In no fingerprint: may change between runs."""

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto",
        description="auto: what WANDB_MODE says, else online where an API key is configured, "
        "else offline.",
    )
    project: str = Field("stillhouse", min_length=1, description="Weights & Biases project.")
    entity: str | None = Field(
        None, description="Weights & Biases user or team. null: the account's default."
    )
    tags: list[str] = Field(default_factory=list, description="Tags of all runs of this job.")


class JobSpec(Section):
    """One job: a teacher distilled into a student, and the student's quantized cells."""

    name: str = Field(
        description="Name of the run and of its directory below storage: 1 to 63 lower-case "
        "letters, digits, '.', '_' and '-', the first a letter or a digit.",
        json_schema_extra={"pattern": f"^{NAME.pattern}$"},
    )
    seed: int = Field(
        17, ge=0, le=2**32 - 1, description="Seed of weights, data order and draws of this job."
    )
    storage: str = Field(
        "./runs",
        min_length=1,
        description="Folder or fsspec URL (s3://bucket/prefix, gs://...) that holds the runs and "
        "their shared corpora and logit caches. All machines of the cluster must see it.",
    )
    teacher: TeacherSpec | None = Field(
        None, description="The model that is imitated. null: plain training."
    )
    student: StudentSpec = Field(description="The model that learns.")
    tokenizer: TokenizerSpec | None = Field(
        None, description="A tokenizer of its own. null: the teacher's, else the student model's."
    )
    data: DataSpec | None = Field(None, description="The corpus.")
    responses: ResponsesSpec | None = Field(
        None, description="Answers that the student learns from, with distill.mode: responses."
    )
    cache: CacheSpec = Field(
        default_factory=CacheSpec, description="How the teacher's distributions are kept."
    )
    distill: DistillSpec | None = Field(
        default_factory=DistillSpec,
        description="Training. null: sweep student.model as it is.",
    )
    resources: ResourcesSpec = Field(
        default_factory=ResourcesSpec, description="What each stage may take of the cluster."
    )
    sweep: SweepSpec | None = Field(
        default_factory=SweepSpec,
        description="The grid of quantized models. null: stop after training.",
    )
    tracking: TrackingSpec = Field(default_factory=TrackingSpec, description="Weights & Biases.")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        return plain_name(value)

    @model_validator(mode="after")
    def _rules_across_sections(self) -> JobSpec:
        raise_faults(rule_faults(self))
        return self

    @property
    def recovery_sequences(self) -> int:
        """Sequences of train that recovery reads where nothing was captured."""
        recover = self.sweep.recover if self.sweep is not None else None
        return 0 if recover is None else recover.steps * recover.batch_sequences


def rule_faults(spec: JobSpec, at_fault: Iterable[str] = ()) -> list[str]:
    """One line for every rule that `spec` breaks, as `trainer.spec.rules.faults_of` does."""
    return faults_of((*TRAINER_RULES, *_OWN_RULES), spec, at_fault)


def _something_to_do(spec: JobSpec) -> str | None:
    if spec.distill is None and spec.sweep is None:
        return "distill: null and sweep: null leave nothing to do; give one of them"
    return None


def _data_needed(spec: JobSpec) -> str | None:
    users = [name for name in ("distill", "sweep") if getattr(spec, name) is not None]
    if spec.data is None and users:
        return (
            f"data: got null; needed by {' and '.join(users)}, "
            "e.g. data: {train: [{source: builtin:python-docs}]}"
        )
    return None


def _shards_need_workers(spec: JobSpec) -> str | None:
    if spec.teacher is None or spec.teacher.sharding != "zero3":
        return None
    online = spec.distill is not None and spec.distill.mode == "online"
    for stage, counts in (("capture", True), ("distill", online)):
        workers = getattr(spec.resources, stage).workers
        # An elastic group may come down to its fewest, which must hold the teacher too.
        fewest = workers[0] if isinstance(workers, tuple) else workers
        if counts and fewest == 1:
            got = list(workers) if isinstance(workers, tuple) else workers
            return (
                f"teacher.sharding: got zero3 with resources.{stage}.workers: {got}; may be none "
                "or auto, or give at least 2 workers"
            )
    return None


def _untrained_needs_weights(spec: JobSpec) -> str | None:
    if spec.distill is None and spec.student.init != "pretrained":
        return (
            f"student.init: got {spec.student.init}; may be pretrained with distill: null, "
            "which sweeps student.model as it is"
        )
    return None


def _teacher_to_quantize(spec: JobSpec) -> str | None:
    if spec.sweep is None or "teacher" not in spec.sweep.models or spec.teacher is not None:
        return None
    return (
        f"sweep.models: got {list(spec.sweep.models)} with teacher: null; may be [student], or "
        "give a teacher"
    )


def _records_to_recover_with(spec: JobSpec) -> str | None:
    from trainer.stage_inputs import reads_cache

    if spec.sweep is None or spec.sweep.recover is None:
        return None
    if spec.sweep.recover.target != "teacher" or reads_cache(spec):
        return None
    return (
        "sweep.recover.target: got teacher, but this job fills no logit cache with records of the "
        "train part; may be student or auto"
    )


_OWN_RULES = (
    Rule(("distill", "sweep"), _something_to_do),
    Rule(("data", "distill", "sweep"), _data_needed),
    Rule(
        ("teacher", "distill.mode", "resources.capture.workers", "resources.distill.workers"),
        _shards_need_workers,
    ),
    Rule(("distill", "student.init"), _untrained_needs_weights),
    Rule(("teacher", "sweep.models"), _teacher_to_quantize),
    Rule(("teacher", "distill", "sweep.recover"), _records_to_recover_with),
)


def named_models(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Key and name of every model: hub ids, URLs and folders."""
    if spec.teacher is not None:
        yield "teacher.model", spec.teacher.model
    if spec.student.model is not None:
        yield "student.model", spec.student.model
    for number, extra in enumerate(spec.sweep.extra if spec.sweep else ()):
        yield f"sweep.extra.{number}.path", extra.path


def named_sources(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Key and path, or glob, of every source that is neither built in nor on the hub."""
    for number, source in enumerate(spec.data.train if spec.data else ()):
        if not source.source.startswith("builtin:") and is_local(source.source):
            yield f"data.train.{number}.source", source.source


def named_files(spec: JobSpec) -> Iterator[tuple[str, str, str]]:
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
