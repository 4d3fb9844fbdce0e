"""`JobSpec`: the YAML file a user writes, one job. Each floor owns its sections; this joins them.

Paths in a spec (data sources, model folders, `student.config`, `storage`) are relative to the
directory in which the command is run, not to the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cluster.spec import ResourcesSpec
from quant.spec import SweepSpec
from trainer.spec import (
    CacheSpec,
    DataSpec,
    DistillSpec,
    StudentSpec,
    TeacherSpec,
    TokenizerSpec,
    temperature_fault,
)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class TrackingSpec(BaseModel):
    """Weights & Biases. In no fingerprint: may change between runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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


class JobSpec(BaseModel):
    """One job: a teacher distilled into a student, and the student's quantized cells."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
        if not NAME.fullmatch(value):
            raise ValueError(
                "may be 1 to 63 lower-case letters, digits, '.', '_' and '-', "
                "the first a letter or a digit"
            )
        return value

    @model_validator(mode="after")
    def _rules_across_sections(self) -> JobSpec:
        faults = rule_faults(self)
        if faults:
            raise PydanticCustomError("rules", "{text}", {"text": "\n".join(faults)})
        return self


class Rule(NamedTuple):
    """A rule across sections: the keys it reads, and what gives its one-line fault, if any."""

    reads: tuple[str, ...]
    fault: Callable[[JobSpec], str | None]


def rule_faults(spec: JobSpec, at_fault: Iterable[str] = ()) -> list[str]:
    """One line for every rule that `spec` breaks.

    Rules that read one of the dotted keys `at_fault` are left out: their keys hold no values to
    judge. `spec` may then be incomplete there.
    """
    at_fault = list(at_fault)
    faults = (
        rule.fault(spec)
        for rule in RULES
        if not any(_concerns(key, bad) for key in rule.reads for bad in at_fault)
    )
    return [fault for fault in faults if fault is not None]


def _concerns(key: str, bad: str) -> bool:
    """Whether a rule that reads `key` is blind when `bad` is at fault.

    A rule that reads a whole section asks only whether it is there, so a fault inside of it
    does not matter.
    """
    if key == bad or key.startswith(bad + "."):
        return True
    return bad.startswith(key + ".") and key not in JobSpec.model_fields


def is_hub_id(model: str) -> bool:
    """Whether `model` is written like a hub id (`name` or `owner/name`), not a path or a URL."""
    return _HUB_ID.fullmatch(model) is not None


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


def _step_of_whole_sequences(spec: JobSpec) -> str | None:
    if spec.distill is None or spec.data is None:
        return None
    tokens, length = spec.distill.tokens_per_step, spec.data.sequence_length
    if tokens % length == 0:
        return None
    nearest = max(1, round(tokens / length)) * length
    return (
        f"distill.tokens_per_step: got {tokens}; may be a multiple of data.sequence_length "
        f"({length}), e.g. {nearest}"
    )


def _tokens_for_a_sequence(spec: JobSpec) -> str | None:
    if spec.data is None or spec.data.max_tokens == "auto":
        return None
    if spec.data.max_tokens >= spec.data.sequence_length:
        return None
    return (
        f"data.max_tokens: got {spec.data.max_tokens}; may be auto or a whole number from "
        f"data.sequence_length ({spec.data.sequence_length})"
    )


def _temperature_captured(spec: JobSpec) -> str | None:
    return None if spec.distill is None else temperature_fault(spec.distill, spec.cache)


def _kl_needs_teacher(spec: JobSpec) -> str | None:
    if spec.teacher is not None or spec.distill is None:
        return None
    if spec.distill.losses.get("forward_kl", 0.0) > 0:
        return (
            "distill.losses: forward_kl needs a teacher; give teacher: {model: ...}, or train "
            "without one: losses: {ce: 1.0}"
        )
    return None


def _control_needs_teacher(spec: JobSpec) -> str | None:
    if spec.distill is None or not spec.distill.control:
        return None
    if spec.teacher is None:
        return "distill.control: got true; may be false without a teacher, whose gain it measures"
    if spec.distill.losses.get("forward_kl", 0.0) == 0:
        return (
            "distill.control: got true; may be false without forward_kl in distill.losses, "
            "as the student is then the control"
        )
    return None


def _shards_need_workers(spec: JobSpec) -> str | None:
    if spec.teacher is None or spec.teacher.sharding != "zero3":
        return None
    if spec.resources.capture.workers != 1:
        return None
    return (
        "teacher.sharding: got zero3 with resources.capture.workers: 1; may be none or auto, "
        "or give at least 2 workers"
    )


def _untrained_needs_weights(spec: JobSpec) -> str | None:
    if spec.distill is None and spec.student.init == "random":
        return (
            "student.init: got random; may be pretrained with distill: null, "
            "which sweeps student.model as it is"
        )
    return None


def _tokenizer_fits(spec: JobSpec) -> str | None:
    if spec.tokenizer is None:
        if spec.teacher is None and spec.student.model is None:
            return (
                "tokenizer: got null; needed where neither teacher nor student.model brings one, "
                "e.g. tokenizer: {train: 2048}"
            )
        return None
    if spec.teacher is not None:
        return (
            "tokenizer.train: may not be given with a teacher, whose vocabulary the student must "
            "have; remove tokenizer"
        )
    if spec.student.init == "pretrained":
        return (
            "tokenizer.train: may not be given with student.init: pretrained, whose weights "
            "belong to the model's own vocabulary; remove tokenizer"
        )
    return None


def _tokenizer_reads_text(spec: JobSpec) -> str | None:
    if spec.tokenizer is None or spec.data is None:
        return None
    for index, source in enumerate(spec.data.train):
        if source.format == "input_ids":
            return (
                f"data.train.{index}.format: got input_ids; may be text with tokenizer.train, "
                "which learns from text"
            )
    return None


def _revision_of_hub_id(section: str) -> Callable[[JobSpec], str | None]:
    def fault(spec: JobSpec) -> str | None:
        part: Any = getattr(spec, section)
        if part is None or part.revision == "main":
            return None
        if part.model is not None and is_hub_id(part.model):
            return None
        return (
            f"{section}.revision: got {json.dumps(part.revision)}; only hub ids have revisions, "
            f"{section}.model is {json.dumps(part.model)}"
        )

    return fault


RULES = (
    Rule(("distill", "sweep"), _something_to_do),
    Rule(("data", "distill", "sweep"), _data_needed),
    Rule(("distill.tokens_per_step", "data.sequence_length"), _step_of_whole_sequences),
    Rule(("data.max_tokens", "data.sequence_length"), _tokens_for_a_sequence),
    Rule(("distill.temperature", "cache.method", "cache.temperatures"), _temperature_captured),
    Rule(("teacher", "distill.losses"), _kl_needs_teacher),
    Rule(("teacher", "distill.control", "distill.losses"), _control_needs_teacher),
    Rule(("teacher", "resources.capture.workers"), _shards_need_workers),
    Rule(("distill", "student.init"), _untrained_needs_weights),
    Rule(("teacher", "tokenizer", "student.model", "student.init"), _tokenizer_fits),
    Rule(("tokenizer", "data.train"), _tokenizer_reads_text),
    Rule(("teacher.model", "teacher.revision"), _revision_of_hub_id("teacher")),
    Rule(("student.model", "student.revision"), _revision_of_hub_id("student")),
)
