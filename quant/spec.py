"""The spec section `sweep`: which models are quantized how, measured on what, and kept."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.storage.section import Section
from quant.quant_spec import (
    AUTO_GROUP_SIZES,
    BITS,
    CHANNEL,
    DYNAMIC,
    GroupSize,
    Method,
    QuantSpec,
    fitting_group_sizes,
    is_group_size,
)
from trainer.spec.rules import plain_name

WholeNumber = Annotated[int, Field(strict=True)]  # else pydantic takes true for 1
Flag = Annotated[bool, Field(strict=True)]
Bits = Annotated[WholeNumber, Field(description=f"One of {', '.join(map(str, BITS))}.")]
Reference = Literal["student", "teacher"]  # the 16-bit models that a cell can be made of


class Excluded(Section):
    """Cells of the grid that are left out: those that fit every key given."""

    bits: WholeNumber | None = Field(None, description="Of this width.")
    group_size: WholeNumber | Literal["channel"] | None = Field(
        None, description="Of this group size."
    )
    method: Method | None = Field(None, description="By this quantizer.")
    embeddings: bool | None = Field(None, description="With the embeddings quantized, or not.")
    head: bool | None = Field(None, description="With the head quantized, or not.")
    model: Reference | None = Field(None, description="Made of this model.")

    @model_validator(mode="after")
    def _says_something(self) -> Excluded:
        if not self.model_dump(exclude_none=True):
            raise ValueError("excludes every cell; give at least one key, e.g. {bits: 2}")
        return self

    def fits(self, spec: QuantSpec, model: str) -> bool:
        """Whether the cell of `spec`, made of `model`, is left out."""
        found = {**spec.to_dict(), "model": model}
        return all(found[key] == value for key, value in self.model_dump(exclude_none=True).items())


class ExtraModel(Section):
    """A model that was quantized elsewhere, measured beside the cells."""

    path: str = Field(
        min_length=1,
        description="Folder, URL or hub id of any Hugging Face causal language model with the "
        "student's tokenizer, or a folder that `stillhouse quantize --out` wrote.",
    )
    name: str | None = Field(
        None, description="How the table calls it. null: the last part of the path."
    )

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str | None) -> str | None:
        return value if value is None else plain_name(value)

    @property
    def label(self) -> str:
        """The name, as a key."""
        if self.name is not None:
            return self.name
        parts = [part for part in self.path.replace("\\", "/").split("/") if part]
        last = parts[-1] if parts else self.path
        return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._")[:63] or "extra"


class Task(Section):
    """A benchmark of lm-eval, by its name or as a local folder."""

    task: str | None = Field(
        None, min_length=1, description="Name of a task or group of lm-eval, e.g. arc_easy."
    )
    folder: str | None = Field(
        None,
        min_length=1,
        description="Folder of a local task: its YAML files and data, read without a network.",
    )
    num_fewshot: WholeNumber | None = Field(
        None, ge=0, description="Examples in the prompt. null: what the task says."
    )
    limit: WholeNumber | None = Field(
        None, ge=1, description="Only the first so many documents. null: all."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Task:
        if (self.task is None) == (self.folder is None):
            raise ValueError("needs a task or a folder, one of the two, e.g. {task: arc_easy}")
        return self


class RecoverSpec(Section):
    """A few steps of distillation of scales, zero points and norms; the codes stay."""

    steps: WholeNumber = Field(200, ge=1, description="Optimizer steps.")
    bits: list[Bits] = Field(
        default=[3, 2, 1],
        min_length=1,
        description="Cells of these widths get a recovered one beside them.",
    )
    target: Literal["auto", "teacher", "student"] = Field(
        "auto",
        description="teacher: the records of the logit cache that the student learnt from. "
        "student: the 16-bit model, run beside it. auto: teacher where there is a cache with "
        "records of the train part, else student.",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="Peak of a cosine schedule, of the logarithms of scales. auto: 5e-3."
    )
    batch_sequences: WholeNumber = Field(8, ge=1, description="Sequences per step.")

    @field_validator("bits")
    @classmethod
    def _bits_offered(cls, value: list[int]) -> list[int]:
        return _offered(value)


class SweepSpec(Section):
    """The grid of quantized models: every method with every width and group size."""

    bits: list[WholeNumber] = Field(
        default=[8, 4, 3, 2],
        min_length=1,
        description=f"Code widths in bits, each one of {', '.join(map(str, BITS))}.",
    )
    group_size: (
        Literal["auto"] | Annotated[list[WholeNumber | Literal["channel"]], Field(min_length=1)]
    ) = Field(
        "auto",
        description="Weights that share one scale and zero point: multiples of 8 that divide the "
        "input width of every quantized layer, or channel: one scale per output channel. auto: the "
        "two largest of 128, 64, 32, 16 and 8 that divide the widths of all models of the grid.",
    )
    methods: list[Method] = Field(
        default=["hqq"],
        min_length=1,
        description="Quantizers. hqq: half-quadratic optimization of the zero points. rtn: round "
        "to nearest, the baseline. int8-dynamic: weights in int8 per channel, activations in int8 "
        "per token; one cell, whatever bits and group_size are.",
    )
    embeddings: Flag | list[Flag] = Field(
        False,
        description="Quantize the input embeddings too, or [false, true]: cells of both kinds. "
        "Where they are tied to the head: together with head only.",
    )
    head: Flag | list[Flag] = Field(
        False,
        description="Quantize the output head too, or [false, true]: cells of both kinds. Where "
        "it is tied to the embeddings: together with embeddings only.",
    )
    exclude: list[Excluded] = Field(
        default=[],
        description="Cells of the grid that are left out, e.g. [{bits: 2, group_size: 128}].",
    )
    models: list[Reference] = Field(
        default=["student"],
        min_length=1,
        description="What the grid is made of: the student, the teacher, or both. With both, the "
        "report says whether to distil, to quantize, or to do both.",
    )
    extra: list[ExtraModel] = Field(
        default=[],
        description="Models quantized elsewhere, for the same table, e.g. [{path: some-folder}].",
    )
    budgets_mb: list[Annotated[float, Field(gt=0)]] = Field(
        default=[],
        description="For each size in megabytes (10^6 bytes) one cell whose bits and group sizes "
        "are chosen layer by layer, by their KL on select, and uniform cells of its size beside "
        "it. The choices are bits and group_size above, and 16 bits. Of the student; of the "
        "teacher where models names it alone.",
    )
    recover: RecoverSpec | None = Field(
        None,
        description="Recovered cells beside the plain ones, e.g. {steps: 200}; of the student, or "
        "of the teacher where models names it alone. null: none.",
    )
    tasks: list[Task] = Field(
        default=[],
        description="Benchmarks of lm-eval for every model: names, {task: NAME, num_fewshot: 5, "
        "limit: 200}, or {folder: DIR} for a local task.",
    )
    keep_models: Literal["all", "pareto", "none"] = Field(
        "all",
        description="Which cells keep their models. pareto: those that no other cell beats in "
        "true bytes and KL on select, ties included. none: results alone.",
    )
    keep_16bit: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="Modules that stay in 16 bits in every cell: names or globs, which hold for "
        "all inside a module, e.g. '*.experts*'. What cannot be quantized must be listed.",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="What models and cells are computed in when they are measured, all alike, "
        "whatever dtype they are stored in. auto: bfloat16 on GPUs and on CPUs with instructions "
        "for it, else float32.",
    )
    batch_sequences: WholeNumber = Field(
        8,
        ge=1,
        description="Sequences per evaluation batch. Fixed and recorded: results may change "
        "in the last digits with it.",
    )
    speed_prompt_tokens: WholeNumber = Field(
        128, ge=1, description="Prompt length in tokens of the speed measurement."
    )
    speed_decode_tokens: WholeNumber = Field(
        32, ge=2, description="Tokens generated in the speed measurement."
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_of_tasks(cls, value: object) -> object:
        if isinstance(value, list):
            return [{"task": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("bits")
    @classmethod
    def _bits_offered(cls, value: list[int]) -> list[int]:
        return _unique(_offered(value))

    @field_validator("group_size")
    @classmethod
    def _group_sizes(cls, value: Literal["auto"] | list[GroupSize]) -> object:
        if value == "auto":
            return value
        wrong = [size for size in value if size != CHANNEL and not is_group_size(size)]
        if wrong:
            text = ", ".join(map(str, wrong))
            raise ValueError(
                f"{text} is no group size; may be a multiple of 8, from 8 on, or {CHANNEL}"
            )
        return _unique(value)

    @field_validator("methods", "models", "budgets_mb")
    @classmethod
    def _listed_once(cls, value: list[Any]) -> list[Any]:
        return _unique(value)

    @field_validator("embeddings", "head")
    @classmethod
    def _flags_once(cls, value: bool | list[bool]) -> bool | list[bool]:
        if isinstance(value, list):
            if not value:
                raise ValueError("may be true, false or [false, true]")
            _unique(value)
        return value

    @model_validator(mode="after")
    def _something_left(self) -> SweepSpec:
        if not self.cells() and not any(self.cells(model) for model in self.models):
            raise ValueError("exclude leaves no cell; exclude fewer")
        labels = [extra.label for extra in self.extra]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(
                f"extra: two models are called {', '.join(twice)}; give each a name of its own"
            )
        return self

    @property
    def group_sizes(self) -> list[GroupSize]:
        """`group_size` as a list; while it is auto, the sizes of most models stand for it."""
        return sorted(AUTO_GROUP_SIZES[:2]) if self.group_size == "auto" else [*self.group_size]

    def with_group_sizes(self, widths: Iterable[int]) -> SweepSpec:
        """Itself with group sizes in place of auto, for layers of these input widths.

        Raises ValueError, one line, where `exclude` leaves no cell of them.
        """
        if self.group_size != "auto":
            return self
        found = self.model_copy(update={"group_size": fitting_group_sizes(widths)})
        if not any(found.cells(model) for model in ("student", *self.models)):
            sizes = ", ".join(map(str, found.group_sizes))
            raise ValueError(
                f"sweep.exclude: leaves no cell of the group sizes {sizes}, which are those of "
                "sweep.group_size: auto for these models; exclude fewer"
            )
        return found

    @property
    def embedding_choices(self) -> list[tuple[bool, bool]]:
        """(embeddings, head): which of them are quantized too, of all cells."""
        tables = self.embeddings if isinstance(self.embeddings, list) else [self.embeddings]
        heads = self.head if isinstance(self.head, list) else [self.head]
        return [(table, head) for table in tables for head in heads]

    def cells(self, model: str = "student") -> list[QuantSpec]:
        """The cells of the grid made of `model`, in the order of the spec; none twice."""
        grid = [
            (8, CHANNEL, method, *end) if method == DYNAMIC else (bits, size, method, *end)
            for end in self.embedding_choices
            for method in self.methods
            for bits in self.bits
            for size in self.group_sizes
        ]
        found = [QuantSpec(*point) for point in dict.fromkeys(grid)]
        return [spec for spec in found if not any(item.fits(spec, model) for item in self.exclude)]


def _offered(value: list[int]) -> list[int]:
    wrong = [bits for bits in value if bits not in BITS]
    if wrong:
        text = ", ".join(map(str, wrong))
        raise ValueError(f"{text} bits are not offered; may be {list(BITS)}")
    return value


def _unique(value: list[Any]) -> list[Any]:
    repeated = [item for item in dict.fromkeys(value) if value.count(item) > 1]
    if repeated:
        raise ValueError(f"repeated cells: {repeated} listed more than once; list each once")
    return value
