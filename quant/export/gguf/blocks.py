"""ggml's blocks of 32 weights, made of codes or of plain weights.

The layouts are those of ggml-common.h (github.com/ggml-org/llama.cpp): Q4_1 and Q5_1 hold
`w = q * d + m`, Q8_0 holds `w = q * d` with signed q; d and m are float16. So codes with
`w = (q - z) * s` fit Q4_1 and Q5_1 as they are: d = s and m = -z * s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from torch import Tensor

from quant.codes import Codes
from quant.layers.linear import QuantWeight

BLOCK = 32
LARGEST_HALF = 65504.0
CHUNK_WEIGHTS = 1 << 21  # weights encoded at a time: their float32 copies stay small
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Encoded:
    """A tensor as the file holds it, and what that cost.

    data: uint8 `[rows, bytes per row]`. error: norm of the difference over norm of the weight;
    largest: largest absolute difference. Both 0 when nothing was lost.
    """

    data: Bytes
    error: float
    largest: float


def type_of_codes(weight: QuantWeight) -> tuple[Type, str]:
    """The type that holds these codes best, and what there is to say about it ("" where it holds
    them exactly and in their own width)."""
    held = weight.stored()
    if weight.columns % BLOCK:
        why = f"rows are no multiple of {BLOCK} weights wide, so they are stored unquantized"
        return plain_type_of_codes(weight, Type.F16), why
    if weight.bits > 5:
        exact = _fits_signed(held["zero"], weight.bits) and weight.group_size % BLOCK == 0
        return Type.Q8_0, "" if exact else f"{weight.bits}-bit codes are quantized anew to Q8_0"
    if weight.group_size % BLOCK:
        why = f"groups of {weight.group_size} are no multiple of {BLOCK}: quantized anew to Q8_0"
        return Type.Q8_0, why
    if not torch.isfinite(_offset(held["scale"], held["zero"])).all():
        why = "an offset -zero * scale is beyond float16, so they are stored unquantized"
        return plain_type_of_codes(weight, Type.F16), why
    if weight.bits == 5:
        return Type.Q5_1, ""
    few = f"{weight.bits}-bit codes take Q4_1's 4 bits, and 5 bits per weight with its scales"
    return Type.Q4_1, "" if weight.bits == 4 else few


def plain_type_of_codes(weight: QuantWeight, wanted: Type) -> Type:
    """`wanted` for the weight that the codes stand for, or the nearest type that can hold it."""
    scale, zero = (weight.stored()[name].float() for name in ("scale", "zero"))
    farthest = torch.maximum(zero.abs(), (2**weight.bits - 1 - zero).abs())
    return plain_type(weight.columns, float((farthest * scale.abs()).max()), wanted)


def plain_type(columns: int, largest: float, wanted: Type, narrow: Type = Type.F32) -> Type:
    """`wanted`, or the nearest type that can hold rows of this width and values up to `largest`:
    blocks need whole rows of them, and F16 ends at 65504, where `narrow` takes over."""
    if wanted == Type.F32 or (wanted != Type.F16 and columns % BLOCK == 0):
        return wanted
    return Type.F16 if largest <= LARGEST_HALF else narrow


def encode(weight: Codes | Tensor, kind: Type) -> Encoded:
    """`weight` (codes, or any float dtype `[rows, columns]`) stored as `kind`, on the CPU.

    The error is measured on what gguf's own `dequantize` reads back, against float32.
    """
    rows, columns = (weight.codes if isinstance(weight, Codes) else weight).shape
    data = np.empty((rows, *quant_shape_to_byte_shape((columns,), kind)), np.uint8)
    lost = norm = largest = 0.0
    step = max(1, CHUNK_WEIGHTS // columns)
    for first in range(0, rows, step):
        part = _rows(weight, slice(first, first + step))
        dense = (part.dequantize() if isinstance(part, Codes) else part.float()).numpy()
        blocks = _blocks(part, kind) if isinstance(part, Codes) else None
        if blocks is None:
            blocks = quantize(dense, kind).view(np.uint8)
        data[first : first + step] = blocks
        if kind == Type.F32:
            continue
        difference = dequantize(np.ascontiguousarray(blocks), kind)
        difference -= dense
        lost += float(np.vdot(difference, difference))
        norm += float(np.vdot(dense, dense))
        largest = max(largest, float(np.abs(difference).max()))
    return Encoded(data, (lost / norm) ** 0.5 if lost else 0.0, largest)


def _rows(weight: Codes | Tensor, rows: slice) -> Codes | Tensor:
    """Some rows of it, on the CPU."""
    if isinstance(weight, Codes):
        codes, scale, zero = (
            part[rows].cpu() for part in (weight.codes, weight.scale, weight.zero)
        )
        return Codes(codes, scale, zero, weight.bits)
    return weight[rows].detach().cpu()


def _offset(scale: Tensor, zero: Tensor) -> Tensor:
    """m = -zero * scale in float16, of the shape of both; infinite beyond its range."""
    return (-zero.float() * scale.float()).half()


def _fits_signed(zero: Tensor, bits: int) -> bool:
    """Whether `code - zero` is an int8 whatever the code, so that Q8_0 holds it exactly."""
    whole = (zero == zero.round()) & (zero <= 128) & (zero >= 2**bits - 128)
    return bool(whole.all())


def _blocks(weight: Codes, kind: Type) -> Bytes | None:
    """Blocks made of the codes themselves; None where `kind` cannot hold them as they are."""
    if weight.group_size % BLOCK:
        return None
    if kind == Type.Q8_0 and _fits_signed(weight.zero, weight.bits):
        zero = weight.zero.repeat_interleave(weight.group_size, 1).to(torch.int16)
        signed = (weight.codes.to(torch.int16) - zero).to(torch.int8)
        return _joined([_per_block(weight.scale, weight), _in_blocks(signed)])
    if kind not in (Type.Q4_1, Type.Q5_1):
        return None
    codes = _in_blocks(weight.codes)
    offset = _offset(weight.scale, weight.zero)
    fields = [_per_block(weight.scale, weight), _per_block(offset, weight)]
    if kind == Type.Q5_1:  # the fifth bits of a block, weight 0 in the lowest
        fifths: Bytes = np.packbits((codes >> 4).astype(bool), axis=-1, bitorder="little")
        fields.append(fifths)
    half = BLOCK // 2  # a byte has weight i of its block below and weight i + 16 above
    nibbles = (codes[..., :half] & 15) | (codes[..., half:] << 4)
    fields.append(nibbles.view(np.uint8))
    return _joined(fields)


def _in_blocks(values: Tensor) -> Bytes:
    return values.contiguous().numpy().view(np.uint8).reshape(len(values), -1, BLOCK)


def _per_block(values: Tensor, weight: Codes) -> Bytes:
    """float16 `[rows, groups]` as the two bytes of each block: uint8 `[rows, blocks, 2]`."""
    repeated = values.repeat_interleave(weight.group_size // BLOCK, 1).contiguous()
    return repeated.numpy().view(np.uint8).reshape(len(repeated), -1, 2)


def _joined(fields: list[Bytes]) -> Bytes:
    joined = np.concatenate(fields, axis=-1)
    return joined.reshape(len(joined), -1)
