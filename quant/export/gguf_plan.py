"""What goes into a GGUF file: every tensor with its name, type and order of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant.codes import Codes
from quant.export.gguf_blocks import plain_type, plain_type_of_codes, type_of_codes
from quant.export.gguf_model import Architecture, Names, rope_factors, row_order
from quant.linear import QuantWeight

Kind = Literal["auto", "f32", "f16", "q8_0"]
MATRICES = {"auto": Type.F16, "f32": Type.F32, "f16": Type.F16, "q8_0": Type.Q8_0}


@dataclass(frozen=True)
class Planned:
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


def plan(model: PreTrainedModel, offered: Architecture, kind: Kind) -> Iterator[Planned]:
    """Every tensor of the file, in its order.

    A head that is tied is left out: llama.cpp takes the embeddings for a missing one. Raises
    ValueError (one line) for a tensor that the architecture has no place for, or not finite.
    """
    names = Names(model, offered)
    config = model.config
    factors = rope_factors(config)
    if factors is not None:
        yield Planned("rope_freqs.weight", factors, tuple(factors.shape), Type.F32)
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
            yield Planned(names(name), module, shape, stored, order, why)
        for last, parameter in parameters.items():
            name = f"{prefix}.{last}"
            stored, why = _type_of_parameter(name, parameter, kind)
            order = row_order(name, config, offered)
            yield Planned(names(name), parameter, tuple(parameter.shape), stored, order, why)


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
