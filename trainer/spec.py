"""The spec sections that say what is learnt: teacher, student, data, logit cache, training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Dtype = Literal["bfloat16", "float32"]
LossName = Literal["forward_kl", "ce"]
Auto = Literal["auto"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the spec: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class TeacherSpec(Section):
    """The model that is imitated."""

    model: str = Field(
        min_length=1, description="Hub id, local folder, or URL of a Hugging Face folder."
    )
    revision: str = Field("main", description="Branch, tag or commit; for hub ids only.")
    dtype: Dtype = Field("bfloat16", description="Number format of the teacher's weights.")
    sharding: Literal["auto", "none", "zero3"] = Field(
        "auto",
        description="none: every worker holds the whole teacher; zero3: DeepSpeed ZeRO-3 shards "
        "it over the workers of a node, or over all where no node holds it. auto: none where it "
        "fits the worker's memory, else zero3.",
    )


class StudentSpec(Section):
    """The model that learns."""

    model: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Hub id, local folder, or URL of the model to start from."
    )
    revision: str = Field("main", description="Branch, tag or commit; for hub ids only.")
    config: dict[str, Any] | str | None = Field(
        None,
        description="A transformers config, inline (model_type and its sizes) or the path of a "
        "JSON file; vocabulary and special tokens are filled in from the tokenizer. "
        "With init: random.",
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="Start from the model's weights, or from random ones."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> StudentSpec:
        if self.model is None and self.config is None:
            raise ValueError("needs model (hub id or folder) or config (with init: random)")
        if self.config is not None and self.init != "random":
            raise ValueError("config describes a new model and needs init: random")
        if self.config is not None and self.model is not None:
            raise ValueError("has both model and config; give one of them")
        return self


class TokenizerSpec(Section):
    """A tokenizer trained on the corpus."""

    train: int = Field(
        ge=257, le=2**20, description="Vocabulary size of a byte-level BPE trained on the corpus."
    )


class SourceSpec(Section):
    """Where documents come from."""

    source: str = Field(
        min_length=1,
        description="Hub data set id, a glob of local files (txt, json, jsonl, parquet), or "
        "builtin:python-docs (the prose that ships with CPython).",
    )
    format: Literal["text", "input_ids"] = Field(
        "text", description="text: tokenised here; input_ids: already tokenised."
    )
    column: str | None = Field(
        None, description="Column that holds the documents. Default: the name of the format."
    )
    split: str = Field("train", description="Split of a hub data set.")
    name: str | None = Field(None, description="Configuration of a hub data set.")
    weight: float = Field(
        1.0, gt=0, description="How often an epoch reads this source: 2 is twice, 0.5 every second."
    )


class DataSpec(Section):
    """The corpus: sources, and how they become sequences of fixed length."""

    train: list[SourceSpec] = Field(
        min_length=1, description="Sources; select and report are set apart from them too."
    )
    select_sequences: int = Field(
        256, ge=1, description="Sequences of the part on which choices are made."
    )
    report_sequences: int = Field(
        256, ge=1, description="Sequences of the part on which results are reported."
    )
    sequence_length: int = Field(2048, ge=8, description="Tokens per sequence.")
    packing: Literal["documents", "concat"] = Field(
        "documents", description="documents: no attention across documents; concat: across them."
    )
    min_chars: int = Field(1, ge=0, description="Shorter documents are dropped, in characters.")
    max_chars: int | None = Field(
        None, ge=1, description="Longer documents are dropped, in characters."
    )
    max_tokens: Auto | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Train tokens that are captured and read. auto: what the schedule reads.",
    )

    @model_validator(mode="after")
    def _some_length_passes(self) -> DataSpec:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(
                f"max_chars ({self.max_chars}) is below min_chars ({self.min_chars}), "
                "so every document is dropped"
            )
        return self


class CacheSpec(Section):
    """The logit cache: how the teacher's next-token distributions are kept."""

    method: Literal["sample", "topk"] = Field(
        "sample",
        description="sample: ids drawn from the teacher's distribution, unbiased, temperature 1 "
        "only; topk: the k most likely ids and the mass of the rest.",
    )
    draws: int = Field(
        50, ge=1, le=4096, description="sample: ids drawn per position, with replacement."
    )
    redraws: int = Field(
        1,
        ge=1,
        le=64,
        description="sample: independent sets of draws; epoch e reads set e modulo redraws. "
        "Sets are added to a cache when this grows.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="sample: seed of the draws.")
    k: int = Field(64, ge=1, le=4096, description="topk: ids kept per position.")
    keep: float = Field(
        0.0,
        ge=0,
        le=4,
        description="topk: ids whose root of the probability is below keep x step go to the tail, "
        "so confident positions keep fewer; 0: all k are kept.",
    )
    step: Auto | Annotated[float, Field(ge=0.001, le=0.1)] = Field(
        "auto",
        description="topk: quantization step of the root of a probability. "
        "auto: 0.0155 x (50 / k)^0.36.",
    )
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        default=[1.0],
        min_length=1,
        description="topk: temperatures whose tail mass is kept; training may use these and no "
        "others.",
    )
    remap: Literal["frequency", "none"] = Field(
        "frequency",
        description="frequency: ids are numbered by how often the corpus has them, which makes "
        "records smaller; none: as the tokenizer numbers them.",
    )

    @field_validator("temperatures")
    @classmethod
    def _no_repeats(cls, value: list[float]) -> list[float]:
        if len(set(value)) != len(value):
            raise ValueError(f"repeated temperatures in {value}; list each once")
        return value

    @model_validator(mode="after")
    def _of_this_method(self) -> CacheSpec:
        other, method = ("topk", "sample") if self.method == "sample" else ("sample", "topk")
        for name in METHOD_KEYS[other]:
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            # Without a method the key says which one was meant, also where it has its default.
            meant = "method" not in self.model_fields_set and name in self.model_fields_set
            if meant or getattr(self, name) != default:
                raise ValueError(
                    f"{name} is for method: {other}, and this cache is of method: {method}; "
                    f"remove {name} or change the method"
                )
        return self

    def identity(self) -> dict[str, Any]:
        """What decides the content of a record; further sets of draws are further records."""
        names = {"method", "remap", *METHOD_KEYS[self.method]} - {"redraws"}
        return self.model_dump(include=names)


# Keys of `cache` that one method alone reads.
METHOD_KEYS = {
    "sample": ("draws", "redraws", "seed"),
    "topk": ("k", "keep", "step", "temperatures"),
}


class DistillSpec(Section):
    """Training."""

    losses: dict[LossName, float] = Field(
        default={"forward_kl": 1.0},
        description="Weight of each loss: forward_kl (to the teacher), ce (cross-entropy with "
        "the text).",
    )
    temperature: float = Field(
        1.0, gt=0, description="Temperature of forward_kl; one of cache.temperatures."
    )
    dtype: Dtype = Field(
        "bfloat16",
        description="bfloat16: bf16 weights with float32 master weights; float32: all float32.",
    )
    steps: int = Field(2000, ge=1, description="Optimizer steps.")
    tokens_per_step: int = Field(
        262144,
        ge=1,
        description="Tokens per optimizer step over all workers; a multiple of "
        "data.sequence_length.",
    )
    micro_batch: Auto | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Sequences per forward pass on one worker. auto: as many as 16,384 tokens.",
    )
    learning_rate: Auto | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="Peak learning rate. auto: 1e-3 x (768 / width)^0.5 from random weights, at "
        "most 3e-3; 2e-5 from pretrained ones.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning rate after the warm-up; cosine and linear end at 10 %."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps that warm up.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay of matrices.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW betas.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm clipping.")
    zero_stage: Literal[1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage.")
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass, to save memory."
    )
    checkpoint_minutes: float = Field(20.0, gt=0, description="Minutes between checkpoints.")
    checkpoint_steps: int | None = Field(
        None, ge=1, description="Also a checkpoint every so many steps."
    )
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept while training.")
    control: bool = Field(
        False,
        description="Also train the same student with plain cross-entropy: same steps, same data "
        "order, so that the gain of the teacher is measured.",
    )

    @field_validator("losses")
    @classmethod
    def _weights(cls, value: dict[str, float]) -> dict[str, float]:
        if not value or any(weight < 0 for weight in value.values()) or not any(value.values()):
            raise ValueError("needs at least one loss with a weight above 0, and none below 0")
        return value


def temperature_fault(distill: DistillSpec, cache: CacheSpec) -> str | None:
    """One line if the cache does not serve the temperature of the training, else None."""
    if distill.temperature in cache.temperatures:
        return None
    got = f"distill.temperature: got {distill.temperature}"
    if cache.method == "sample":
        return (
            f"{got}; may be 1 with cache.method: sample; others need method: topk, which keeps "
            "the tails of cache.temperatures"
        )
    return f"{got}; may be one of cache.temperatures ({', '.join(map(str, cache.temperatures))})"
