"""A weight matrix in integer codes with one scale and zero point per group: the seam between the
methods that make codes and the layers, files and exports that use them.

Codes are packed tightly: 8 codes of b bits fill exactly b bytes, for every b in 1..8. Code i of a
block of 8 takes the bits [i*b, (i+1)*b) of the block's b bytes, least significant first (a
little-endian bit stream). A block is held in one 64-bit word while its codes are spread to one per
byte, or drawn together, in three steps of halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 19  # weights that are turned into floats at a time on a CPU


@dataclass(frozen=True)
class Codes:
    """`w ~ (codes - zero) * scale`, in groups along the columns that never cross rows.

    codes: uint8 `[out, in]`, each below `2**bits`; scale, zero: float16 `[out, in / group_size]`.
    Raises ValueError when the shapes do not fit each other.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        if self.scale.shape != self.zero.shape or self.scale.dim() != 2 or len(self.scale) != rows:
            raise ValueError(
                f"scale {list(self.scale.shape)} and zero {list(self.zero.shape)} must both be "
                f"[{rows}, groups]"
            )
        groups = self.scale.shape[1]
        if not groups or columns % groups:
            raise ValueError(f"{groups} groups do not divide an input width of {columns}")

    @property
    def group_size(self) -> int:
        """Weights that share one scale and zero point; the whole row if per channel."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]`; computed in float32 (or wider) and rounded once to `dtype`."""
        rows, columns = self.codes.shape
        if torch.compiler.is_compiling():
            return scaled(self.codes, self.scale, self.zero, dtype)
        weight = torch.empty(rows, columns, dtype=dtype, device=self.codes.device)
        for part in row_chunks(rows, columns, self.codes.device):
            weight[part] = scaled(self.codes[part], self.scale[part], self.zero[part], dtype)
        return weight


def scaled(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """`(codes - zero) * scale` of uint8 codes `[rows, columns]`, rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    groups = codes.unflatten(1, (scale.shape[1], -1)).to(wide)
    return groups.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).flatten(1).to(dtype)


def row_chunks(rows: int, columns: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """Slices of rows whose float32 values stay in a CPU's cache; starts are whole `multiple`s.

    Half a million weights: 0.5 ns each on one thread, against 0.7 for 4 million (2,048 columns).
    A GPU is better off with fewer and larger pieces, and they only bound the memory.
    """
    weights = CHUNK if device.type == "cpu" else 64 * CHUNK
    step = max(1, weights // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


BLOCK = 8  # codes per block: the smallest count that fills whole bytes for every width
HALVES = (32, 16, 8)  # width in bits of the fields of a word after each step of spreading
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # of a block's bytes


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take. Raises ValueError as `pack` does."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be packed; bits may be 1 to 8")
    if count % BLOCK:
        raise ValueError(f"{count} codes per row cannot be packed; must be a multiple of {BLOCK}")
    return count * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `[..., n]`, each below 2**bits, into uint8 `[..., n * bits / 8]`.

    Raises ValueError when bits is not 1..8, n is no multiple of 8, or a code is too large.
    """
    width = packed_width(codes.shape[-1], bits)
    packed = codes.new_empty(*codes.shape[:-1], width, dtype=torch.uint8)
    pack_into(packed, codes, bits)
    return packed


def pack_into(packed: Tensor, codes: Tensor, bits: int) -> None:
    """`pack` into a contiguous tensor that is there already, rows at a time: on the way each step
    takes as many bytes again as there are codes. Nothing is written when it raises, as `pack` does.
    """
    count = codes.shape[-1]
    width = packed_width(count, bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype}; must be torch.uint8")
    if packed.shape != (*codes.shape[:-1], width):
        raise ValueError(
            f"codes {list(codes.shape)} do not fit into packed ones {list(packed.shape)}"
        )
    if bits == 8:
        packed.copy_(codes)
        return
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    rows = codes.shape[:-1].numel()
    source, target = codes.reshape(rows, count), packed.view(rows, width)
    for part in row_chunks(rows, count, codes.device):
        target[part] = _packed(source[part], bits).reshape(-1, width)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """The bytes of the codes' blocks, `[blocks, bits]`."""
    words = codes.contiguous().view(-1, BLOCK).view(torch.int64)
    for half in reversed(HALVES):
        used = bits * half // 8
        low = _fields(used, 2 * half)
        words = (words & low) | (words >> (half - used) & low << used)
    if bits in WORDS:  # the low bytes of each word, all at once
        return words.to(WORDS[bits]).view(torch.uint8)
    return words.view(torch.uint8)[:, :bits]


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: uint8 `[..., m]` to uint8 codes `[..., m * 8 / bits]`.

    Raises ValueError when bits is not 1..8 or m is no multiple of bits.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be unpacked; bits may be 1 to 8")
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes are {packed.dtype}; must be torch.uint8")
    if packed.shape[-1] % bits:
        raise ValueError(f"rows of {packed.shape[-1]} bytes do not hold codes of {bits} bits")
    if bits == 8:
        return packed.clone(memory_format=torch.contiguous_format)
    count = packed.shape[-1] * BLOCK // bits
    rows = packed.shape[:-1].numel()
    parts = [] if torch.compiler.is_compiling() else [*row_chunks(rows, count, packed.device)]
    if len(parts) < 2:
        return _unpacked(packed, bits).view(*packed.shape[:-1], count)
    codes = packed.new_empty(*packed.shape[:-1], count)
    source, target = packed.reshape(rows, packed.shape[-1]), codes.view(rows, count)
    for part in parts:
        target[part] = _unpacked(source[part], bits).view(-1, count)
    return codes


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The codes of whole blocks, `[blocks, 8]`."""
    blocks = packed.reshape(-1, bits)
    aligned = torch.compiler.is_compiling() or not blocks.storage_offset() % bits
    if bits in WORDS and aligned:
        words = blocks.view(WORDS[bits]).to(torch.int64)
    else:
        words = torch.zeros(len(blocks), 1, dtype=torch.int64, device=packed.device)
        space = words.view(torch.uint8)
        for byte in range(bits):
            space[:, byte] = blocks[:, byte]
    for half in HALVES:
        used = bits * half // 8
        low = _fields(used, 2 * half)
        words = (words & low) | (words << (half - used) & low << half)
    return words.view(torch.uint8)


def _fields(used: int, width: int) -> int:
    """The mask of the lowest `used` bits of each field of `width` bits in a word."""
    return sum(((1 << used) - 1) << at for at in range(0, 64, width))
