"""Resolves the spec's `auto`: batch sizes, learning rate, recomputation, and dtypes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml

from cluster.storage import Store, read_events
from trainer.models.load import absolute, find_model, width_of
from trainer.processor import DtypeName, fast_dtype, this_device
from trainer.spec.responses import AnswersFile
from trainer.spec.rules import Sections
from trainer.spec.sections import StudentSpec, TeacherSpec

DTYPE_SECTIONS = ("teacher", "distill", "sweep")  # that compute in a dtype of their own
NAMES: tuple[DtypeName, ...] = ("bfloat16", "float32")


class _Spec(Protocol):
    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Any: ...  # noqa: ANN401


AnySpec = TypeVar("AnySpec", bound=_Spec)


def undecided_dtypes(spec: object) -> list[str]:
    """The sections of a spec whose dtype is `auto`."""
    sections = {name: getattr(spec, name, None) for name in DTYPE_SECTIONS}
    return [name for name, each in sections.items() if each is not None and each.dtype == "auto"]


def with_dtypes(spec: AnySpec, dtypes: Mapping[str, DtypeName] | None = None) -> AnySpec:
    """The spec with each `dtype: auto` replaced by the section's own of `dtypes`.

    None: by what this machine is fast at.
    """
    names = undecided_dtypes(spec)
    if not names:
        return spec
    found = dict.fromkeys(names, fast_dtype(this_device())) if dtypes is None else dtypes
    return _updated(spec, {name: found[name] for name in names})


def with_auto(spec: AnySpec, sections: list[str]) -> AnySpec:
    """The spec with `dtype: auto` in these sections again."""
    return _updated(spec, dict.fromkeys(sections, "auto"))


def recorded_dtypes(run: Store) -> dict[str, DtypeName]:
    """What an earlier attempt of a run computed in, by section; {} for a new run."""
    values: Any = None
    if run.exists("spec.yaml"):
        try:
            values = yaml.safe_load(run.read_text("spec.yaml"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return {}
    elif run.exists("events"):  # under torchrun there is no spec.yaml; the events begin with it
        begun = [each for each in read_events(run) if each.get("event") == "run_start"]
        values = begun[-1].get("spec") if begun else None
    sections = values if isinstance(values, dict) else {}
    found: dict[str, DtypeName] = {}
    for name in DTYPE_SECTIONS:
        section = sections.get(name)
        dtype = section.get("dtype") if isinstance(section, dict) else None
        if dtype in NAMES:
            found[name] = dtype
    return found


def _updated(spec: AnySpec, dtypes: Mapping[str, str]) -> AnySpec:
    update = {
        name: getattr(spec, name).model_copy(update={"dtype": dtype})
        for name, dtype in dtypes.items()
    }
    return spec.model_copy(update=update)


# Activations of a micro-batch, in bytes, from which on they are recomputed: without and with LoRA,
# which leaves the room that gradients and optimizer state would take.
RECOMPUTE_FROM, RECOMPUTE_FROM_LORA = 8 << 30, 16 << 30
# Tokens of a pass; on a CPU as many as are so much work, in parameters times tokens: some three
# seconds of a core forward and ten with the way back, after which there is progress to show and a
# stop is heard.
BATCH_TOKENS, CPU_BATCH_WORK, LEAST_BATCH_TOKENS = 16384, 64e9, 512


def auto_learning_rate(init: str, width: int, lora: bool = False) -> float:
    """Rule for `learning_rate: auto`.

    Full fine-tuning of pretrained weights 2e-5. Adapters ten times that, 2e-4, as they start from
    zero and move the weights through a product of low rank (LoRA Without Regret, Thinking Machines
    Lab, 2025: ten times, at every size). A slice of the teacher 1e-4: what was cut has to heal
    (Minitron, Muralidharan et al., 2024). From random weights 1e-3 at width 768, falling with the
    square root of the width, at most 3e-3.
    """
    if lora:
        return 2e-4
    if init == "random":
        return min(3e-3, 1e-3 * math.sqrt(768 / width))
    return 1e-4 if init == "slice" else 2e-5


def auto_micro_batch(sequence_length: int, config: dict[str, Any], device: str) -> int:
    """Rule for `micro_batch: auto`: as many sequences as 16,384 tokens hold, at least one.

    config: as in `auto_activation_checkpointing`. device: "cpu", where a large student has fewer,
    or "cuda". So many tokens keep a GPU busy, and the head's logits are never held whole, whatever
    the vocabulary; where activations grow too large they are recomputed instead.
    """
    return max(1, auto_batch_tokens(layer_weights(config), device) // sequence_length)


def auto_batch_tokens(parameters: int, device: str) -> int:
    """Rule for `resources.capture.batch_tokens: auto`: 16,384 on a GPU, less on a CPU.

    parameters: of the model. device: "cpu" or "cuda". It follows neither the speed of a machine
    nor its load, so that captures of one teacher on CPUs all have blocks of one size.
    """
    if device != "cpu":
        return BATCH_TOKENS
    return min(BATCH_TOKENS, max(LEAST_BATCH_TOKENS, int(CPU_BATCH_WORK / max(1, parameters))))


def auto_activation_checkpointing(config: dict[str, Any], micro_tokens: int, lora: bool) -> bool:
    """Rule for `activation_checkpointing: auto`: recompute where activations exceed 8 GiB.

    config: the student's config.json or inline config; micro_tokens: tokens of a micro-batch on one
    worker. With LoRA from 16 GiB on. Recomputing costs a third more time in the layers.
    """
    limit = RECOMPUTE_FROM_LORA if lora else RECOMPUTE_FROM
    return activation_bytes(config) * micro_tokens > limit


def layer_weights(config: dict[str, Any]) -> int:
    """Weights of a model's layers, about: of the attention's four matrices and the MLP's three."""
    sizes = _Sizes(config)
    return sizes.layers * sizes.width * (4 * sizes.attention + 3 * sizes.inner)


def activation_bytes(config: dict[str, Any]) -> int:
    """Bytes that the layers of a model keep per token for the backward pass, in bfloat16, about.

    Of each layer: the norms' inputs and outputs, partly in float32 (16 bytes for each element of
    the width), queries, keys, values and the attention's output (12 for each element of all
    heads), and the inner states of the MLP (8 for each; 24 where its activation is made of single
    operations). Attention scores are not kept, as by flash and memory-efficient kernels. The idea
    is of Korthikanti et al., 2022, Reducing Activation Recomputation in Large Transformer Models,
    section 4.1; the figures are for transformers' own modules, within 40 % of what they keep.
    """
    text = config.get("text_config") or config
    sizes = _Sizes(config)
    single = text.get("activation_function", "gelu_new") == "gelu_new" and "n_embd" in text
    inner = (24 if single else 8) * sizes.inner
    return sizes.layers * (16 * sizes.width + 12 * sizes.attention + inner)


class _Sizes:
    """The sizes of a model's layers, by what its family calls them; attention: of all heads."""

    def __init__(self, config: dict[str, Any]) -> None:
        text = config.get("text_config") or config
        self.width = _size(text, ("hidden_size", "n_embd"), 768)
        heads = _size(text, ("num_attention_heads", "n_head"), 12)
        self.attention = heads * _size(text, ("head_dim",), max(1, self.width // heads))
        self.inner = _size(text, ("intermediate_size", "n_inner"), 4 * self.width)
        self.layers = _size(text, ("num_hidden_layers", "n_layer"), 12)


def _size(config: dict[str, Any], names: tuple[str, ...], default: int) -> int:
    return next((int(config[name]) for name in names if config.get(name)), default)


Spec = TypeVar("Spec", bound=Sections)


def resolve(
    spec: Spec, dtypes: Mapping[str, DtypeName] | None = None, device: str | None = None
) -> Spec:
    """The spec with local models named absolutely and `auto` resolved.

    dtypes: what `dtype: auto` means, by section; None: what this machine is fast at. device: "cpu"
    or "cuda", where the student is trained; None: this machine's.
    Workers run in directories of their own, so a relative name would mean nothing there. Raises
    ValueError, one line, if the student's config cannot be read.
    """
    spec = with_dtypes(_absolute(spec), dtypes)
    distill, data, student = spec.distill, spec.data, spec.student
    if distill is None:
        return spec
    assert data is not None
    changes: dict[str, Any] = {}
    lora, micro_batch = student.lora is not None, distill.micro_batch
    config: dict[str, Any] = {}
    if "auto" in (micro_batch, distill.learning_rate, distill.activation_checkpointing):
        config = _raw_config(spec)
    if micro_batch == "auto":
        micro_batch = auto_micro_batch(data.sequence_length, config, device or this_device())
        changes["micro_batch"] = micro_batch
    if distill.learning_rate == "auto":
        changes["learning_rate"] = auto_learning_rate(student.init, width_of(config), lora)
    if distill.activation_checkpointing == "auto":
        tokens = micro_batch * data.sequence_length
        changes["activation_checkpointing"] = auto_activation_checkpointing(config, tokens, lora)
    if distill.evaluate_steps == "auto":
        changes["evaluate_steps"] = max(1, distill.steps // 10)
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
    if spec.responses is not None and isinstance(spec.responses.origin, AnswersFile):
        origin = AnswersFile(file=absolute(spec.responses.origin.file))
        update["responses"] = spec.responses.model_copy(update={"origin": origin})
    update["student"] = spec.student.model_copy(update=student)
    return spec.model_copy(update=update)


def _raw_config(spec: Sections) -> dict[str, Any]:
    """The student's config as it is written; of a student cut from its teacher with its layers."""
    student = spec.student
    if isinstance(student.config, dict):
        return student.config
    if student.config is not None:
        path = Path(student.config)
    else:
        key = "student.model"
        model: StudentSpec | TeacherSpec | None = student if student.model is not None else None
        if student.init == "slice":
            key, model = "teacher.model", spec.teacher
        assert model is not None
        folder = find_model(key, str(model.model), model.revision, weights=False)
        path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"student.config: {path} cannot be read as JSON ({error})") from None
    return raw if student.layers is None else {**raw, "num_hidden_layers": student.layers}
