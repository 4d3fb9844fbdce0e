"""Which models llama.cpp can run, under which names and keys, and in which order of rows.

What has to be in a file is read off llama.cpp's loader (src/llama-model.cpp, src/models/*.cpp) and
its own converter (conversion/*.py, github.com/ggml-org/llama.cpp).

`planned_tensors` gives every tensor of a file with its name, type and order of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quant.codes import Codes
from quant.export.gguf.blocks import plain_type, plain_type_of_codes, type_of_codes
from quant.layers.linear import QuantWeight


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    model: what of transformers runs on it. paired: its rotary embedding turns neighbouring rows
    (2i, 2i + 1), where transformers turns rows i and i + head / 2. rope: the rope types it can be
    given. biases: modules that may have one.
    """

    key: MODEL_ARCH
    model: type[PreTrainedModel]
    paired: bool
    rope: tuple[str, ...]
    biases: tuple[str, ...]

    @property
    def name(self) -> str:
        """llama.cpp's name for it."""
        return MODEL_ARCH_NAMES[self.key]


# What llama.cpp takes for granted in YaRN; whoever runs a file may set the first two otherwise.
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
}
_ATTENTION = ("q_proj", "k_proj", "v_proj")
ARCHITECTURES = {
    "llama": Architecture(
        MODEL_ARCH.LLAMA,
        LlamaForCausalLM,
        True,
        ("default", "linear", "yarn", "llama3"),
        (*_ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "qwen3": Architecture(
        MODEL_ARCH.QWEN3, Qwen3ForCausalLM, False, ("default", "linear", "yarn"), _ATTENTION
    ),
}


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The architecture of `model`. Raises ValueError (one line) for what is not offered."""
    config = model.config
    kind = config.model_type
    offered = ARCHITECTURES.get(kind)
    if offered is None or not isinstance(model, offered.model):
        raise ValueError(
            f"{type(model).__name__} (model_type {kind!r}) cannot be exported to gguf; may be "
            f"{', '.join(one.model.__name__ for one in ARCHITECTURES.values())}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config.hidden_act!r}: llama.cpp runs {kind} with 'silu'")
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise ValueError(f"layer_types: llama.cpp runs {kind} with 'full_attention' alone")
    rope = rope_of(config)
    if rope["rope_type"] not in offered.rope:
        raise ValueError(
            f"rope_type {rope['rope_type']!r} cannot be exported to gguf for {kind}; may be "
            f"{', '.join(map(repr, offered.rope))}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor: llama.cpp turns whole heads in {kind}")
    for key, usual in YARN.items() if rope["rope_type"] == "yarn" else ():
        if rope.get(key) not in (None, usual):
            raise ValueError(f"{key} of rope_type 'yarn' is {rope[key]}; may be {usual} in gguf")
    return offered


def rope_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The rope's parameters, with "rope_type" among them."""
    return {"rope_type": "default", **(config.rope_parameters or {})}


def head_size(config: PreTrainedConfig) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Names:
    """Names of a model's tensors in the file, e.g. `blk.0.attn_q.weight`."""

    def __init__(self, model: PreTrainedModel, offered: Architecture) -> None:
        self._offered = offered
        self._kind = model.config.model_type
        self._map = get_tensor_name_map(offered.key, model.config.num_hidden_layers)

    def __call__(self, name: str) -> str:
        """Raises ValueError for a tensor that the architecture has no place for."""
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        module, _, last = name.rpartition(".")
        if found is None or (last == "bias" and not module.endswith(self._offered.biases)):
            raise ValueError(f"tensor {name}: llama.cpp's {self._kind} has no place for it")
        return found


def row_order(name: str, config: PreTrainedConfig, offered: Architecture) -> Tensor | None:
    """The order in which the rows of this weight or bias go into the file: int64 `[rows]`, or
    None for its own. Whole rows move, so codes, scales and zeros move with them."""
    module = name.split(".")[-2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module)
    if not offered.paired or heads is None:
        return None
    size = head_size(config)
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).flatten()


def rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """Llama 3's rope scaling as llama.cpp takes it: what each frequency is divided by, float32
    `[head / 2]`; None for models without."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled.double()).float()


def add_parameters(
    writer: GGUFWriter, config: PreTrainedConfig, offered: Architecture, rows: int
) -> None:
    """Write the model's hyperparameters; rows: those of the embedding table."""
    size = head_size(config)
    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = rope_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    scaling = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}
    if rope["rope_type"] in scaling:
        writer.add_rope_scaling_type(scaling[rope["rope_type"]])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(trained)


Kind = Literal["auto", "f32", "f16", "q8_0"]
MATRICES = {"auto": Type.F16, "f32": Type.F32, "f16": Type.F16, "q8_0": Type.Q8_0}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file.

    source: where its values are; order: that of its rows in the file (None: as they are); kind:
    the type it is stored in; why: what there is to say about that, "" for nothing.
    """

    name: str
    source: QuantWeight | Tensor
    shape: tuple[int, ...]
    kind: Type
    order: Tensor | None = None
    why: str = ""

    @property
    def count(self) -> int:
        """Its weights."""
        return torch.Size(self.shape).numel()

    def weight(self) -> Codes | Tensor:
        """The codes, or the plain weight `[rows, columns]`, its rows in the file's order."""
        if isinstance(self.source, QuantWeight):
            held = self.source.unpacked()
            if self.order is None:
                return held
            order = self.order.to(held.codes.device)
            return Codes(held.codes[order], held.scale[order], held.zero[order], held.bits)
        plain = self.source.detach()
        plain = plain if self.order is None else plain[self.order.to(plain.device)]
        return plain if plain.dim() == 2 else plain.view(1, -1)


def planned_tensors(
    model: PreTrainedModel, offered: Architecture, kind: Kind
) -> Iterator[PlannedTensor]:
    """Every tensor of the file, in its order.

    A head that is tied is left out: llama.cpp takes the embeddings for a missing one. Raises
    ValueError (one line) for a tensor that the architecture has no place for, or not finite.
    """
    names = Names(model, offered)
    config = model.config
    factors = rope_factors(config)
    if factors is not None:
        yield PlannedTensor("rope_freqs.weight", factors, tuple(factors.shape), Type.F32)
    tied = _tied_head(model)
    for prefix, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if module is tied:
            parameters.pop("weight", None)
        elif isinstance(module, QuantWeight):
            name = f"{prefix}.weight"
            stored, why = _type_of_weight(name, module, kind)
            shape = (module.rows, module.columns)
            order = row_order(name, config, offered)
            yield PlannedTensor(names(name), module, shape, stored, order, why)
        for last, parameter in parameters.items():
            name = f"{prefix}.{last}"
            stored, why = _type_of_parameter(name, parameter, kind)
            order = row_order(name, config, offered)
            yield PlannedTensor(names(name), parameter, tuple(parameter.shape), stored, order, why)


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the embedding table, quantized or not."""
    table = model.get_input_embeddings()
    if isinstance(table, QuantWeight):
        return table.rows
    assert isinstance(table.weight, Tensor)
    return table.weight.shape[0]


def _tied_head(model: PreTrainedModel) -> nn.Module | None:
    """The head, if its weight is the embedding table's."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, QuantWeight):
        return head if getattr(head, "shared", None) is table else None
    weight = getattr(table, "weight", None)
    return head if weight is not None and head is not None and head.weight is weight else None


def _type_of_weight(name: str, weight: QuantWeight, kind: Kind) -> tuple[Type, str]:
    held = weight.stored()
    for part in ("scale", "zero"):
        if not torch.isfinite(held[part]).all():
            raise ValueError(f"tensor {name}: its {part}s hold values that are not finite")
    if kind == "auto":
        return type_of_codes(weight)
    return plain_type_of_codes(weight, MATRICES[kind]), ""


def _type_of_parameter(name: str, parameter: Tensor, kind: Kind) -> tuple[Type, str]:
    low, high = (float(end) for end in torch.aminmax(parameter))  # nan if any is
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(f"tensor {name} holds values that are not finite")
    if parameter.dim() != 2:
        return Type.F32, ""
    largest = max(-low, high)
    narrow = Type.BF16 if parameter.dtype == torch.bfloat16 else Type.F32
    stored = plain_type(parameter.shape[1], largest, MATRICES[kind], narrow)
    return stored, "" if stored == MATRICES[kind] else f"{MATRICES[kind].name} cannot hold them"
