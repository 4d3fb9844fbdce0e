"""The spec sections that say what is learnt: teacher, student, data, logit cache, training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.storage.section import Section, fault_at
from trainer.spec.losses import LossesSpec

Dtype = Literal["auto", "bfloat16", "float32"]
Auto = Literal["auto"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class TeacherSpec(Section):
    """The model that is imitated."""

    model: str = Field(
        min_length=1, description="Hub id, local folder, or URL of a Hugging Face folder."
    )
    revision: str = Field("main", description="Branch, tag or commit; for hub ids only.")
    dtype: Dtype = Field(
        "auto",
        description="Number format that the teacher's weights are held and multiplied in. auto: "
        "bfloat16 on GPUs and on CPUs with instructions for it, else float32.",
    )
    sharding: Literal["auto", "none", "zero3"] = Field(
        "auto",
        description="none: every worker holds the whole teacher; zero3: DeepSpeed ZeRO-3 shards "
        "it over the workers of a node, or over all where no node holds it. auto: none where it "
        "fits the worker's memory, else zero3.",
    )


class LoraSpec(Section):
    """Low-rank adapters (LoRA) are trained, the student's own weights stay as they are."""

    r: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Adapters are scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    targets: Auto | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = (
        Field(
            "auto",
            description="Linear layers that get an adapter, by the end of their names, e.g. "
            "[q_proj, v_proj]. auto: all but the head.",
        )
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
    init: Literal["pretrained", "random", "slice"] = Field(
        "pretrained",
        description="Start from the model's weights, from random ones, or from evenly kept layers "
        "of the teacher (slice, with layers).",
    )
    layers: int | None = Field(
        None, ge=1, description="Layers that init: slice keeps of the teacher's."
    )
    lora: LoraSpec | None = Field(
        None, description="Train adapters of low rank only. null: train all weights."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> StudentSpec:
        if self.init == "slice":
            if self.model is not None or self.config is not None:
                raise ValueError("init: slice takes the teacher's layers; remove model and config")
            if self.layers is None:
                raise fault_at(
                    "layers", "missing; may be how many of the teacher's layers init: slice keeps"
                )
            return self
        if self.layers is not None:
            raise fault_at("layers", "is for init: slice; remove it, or set student.init: slice")
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
    format: Literal["text", "input_ids", "messages", "prompt_completion"] = Field(
        "text",
        description="text: tokenised here; input_ids: already tokenised; messages: conversations "
        "(lists of {role, content}); prompt_completion: the columns prompt and completion, texts "
        "or messages. Of the last two the loss counts what the assistant says alone.",
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
        description="Sources; select and report are set apart from them too. With distill.mode: "
        "responses they hold the prompts, and are [] where responses.from is a file.",
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
        description="Train tokens that are prepared, captured and read. auto: as many as the "
        "schedule reads.",
    )
    corpus: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = Field(
        None,
        description="Fingerprint of a corpus that is in storage already, below _corpora: the "
        "sources are then not read, and need not be at hand.",
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
    positions: Literal["all", "loss"] = Field(
        "all",
        description="Positions that are captured. all: every one; loss: those that count in the "
        "loss, such as the assistant's words of a conversation.",
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
        names = {"method", "positions", "remap", *METHOD_KEYS[self.method]} - {"redraws"}
        return self.model_dump(include=names)


# Keys of `cache` that one method alone reads.
METHOD_KEYS = {
    "sample": ("draws", "redraws", "seed"),
    "topk": ("k", "keep", "step", "temperatures"),
}


class DistillSpec(Section):
    """Training."""

    mode: Literal["cached", "online", "responses"] = Field(
        "cached",
        description="cached: the teacher's distributions come from the logit cache; online: from "
        "the teacher itself, beside the student; responses: the corpus is made of answers "
        "(section responses), with cached distributions of them if the losses want any.",
    )
    losses: LossesSpec = Field(
        default_factory=lambda: LossesSpec(forward_kl=1.0),
        description="What is learnt, and how much each counts.",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="Temperature of the losses to the teacher's distributions; with a cache one of "
        "cache.temperatures.",
    )
    dtype: Dtype = Field(
        "auto",
        description="bfloat16: bf16 weights with float32 master weights; float32: all float32. "
        "auto: bfloat16 on GPUs and on CPUs with instructions for it, else float32.",
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
        description="Sequences per forward pass on one worker. auto: as many as 16,384 tokens; on "
        "CPUs as many as take some ten seconds, so that progress shows and a stop is heard.",
    )
    learning_rate: Auto | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="Peak learning rate. auto: 2e-5 from pretrained weights, 2e-4 with lora, 1e-4 "
        "for a slice of the teacher; 1e-3 x (768 / width)^0.5 from random ones, at most 3e-3.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning rate after the warm-up; cosine and linear end at 10 %."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps that warm up.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay of matrices.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW betas.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm clipping.")
    zero_stage: Literal[1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage.")
    offload: Literal["none", "cpu"] = Field(
        "none",
        description="cpu: optimizer state and master weights in host memory (ZeRO-Offload).",
    )
    activation_checkpointing: Auto | bool = Field(
        "auto",
        description="Recompute activations in the backward pass, to save memory. auto: where those "
        "of a micro-batch are estimated above 8 GiB, with lora above 16 GiB.",
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="Laid over the DeepSpeed configuration that the other keys make; keys that "
        "these own are refused.",
    )
    evaluate_steps: Auto | Annotated[int, Field(ge=1)] | None = Field(
        "auto",
        description="Evaluate on select every so many steps; the best weights become the student, "
        "the last are kept beside it. auto: a tenth of the steps; null: only at the end.",
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


def temperature_fault(distill: DistillSpec, cache: CacheSpec) -> str | None:
    """One line if the cache does not serve the temperature of the training, else None."""
    if distill.mode == "online" or distill.temperature in cache.temperatures:
        return None
    got = f"distill.temperature: got {distill.temperature}"
    if cache.method == "sample":
        return (
            f"{got}; may be 1 with cache.method: sample; others need method: topk, which keeps "
            "the tails of cache.temperatures"
        )
    return f"{got}; may be one of cache.temperatures ({', '.join(map(str, cache.temperatures))})"
