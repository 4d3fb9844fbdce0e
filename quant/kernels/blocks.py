"""Codes x int8 on x86 CPUs, by an op of this project in C++ (codes.cpp has formula and layout).

Activations are rounded to int8 in blocks of 32 columns, with a float32 scale each, as llama.cpp
does; all else is exact but for float32 sums, fractional zero points too. The error is that of the
rounding, at most half a step of max|x| / 127 in each block: about 0.5 % of a product with normal
inputs, up to 2 % where one input of a row is 30 times as large as the others.

`lost_offsets` estimates what bfloat16 rounds off the offsets of int4 kernels. Those add one
bfloat16 offset `(8 - z) s` to all weights of a group. What is rounded off is the same for the whole
group: over inputs without a mean it averages out, over others it adds up, most where one large
weight has stretched its group's range and the others are small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.codes import Codes, row_chunks
from quant.kernels import native
from quant.kernels.kernel import Kernel, Refused, StoredWeight
from trainer.processor import cpu_kind

LANES = 16  # rows of the weight that lie side by side
BLOCK = 32  # columns of activations that share a scale


class Blocks(Kernel):
    """The weight in blocks of 16 rows, codes in 4 bits (up to 4-bit codes) or 8."""

    def __init__(self, weight: StoredWeight) -> None:
        super().__init__(weight)
        if weight.group_size % BLOCK:
            raise Refused(f"groups of {weight.group_size} are no multiple of {BLOCK}")
        if not bool(weight.scale.isfinite().all() and weight.zero.isfinite().all()):
            raise Refused("a scale or zero point is not finite")
        if reason := native.unavailable():
            raise Refused(reason)
        self.vnni = native.use_vnni()
        self.narrow = weight.bits <= 4
        self.few = most_rows()
        isa = "AVX512-VNNI" if self.vnni else "AVX2"
        self.name = f"{'int4' if self.narrow else 'uint8'} x int8 ({isa})"
        if self.few is not None:
            self.name += f" to {self.few} rows, then dequantize+matmul"
        padded = -(-self.rows // LANES) * LANES
        width = self.columns // 2 if self.narrow else self.columns
        self.packed = torch.empty(padded // LANES, LANES * width, dtype=torch.uint8)
        for part in row_chunks(padded, self.columns, self.packed.device, LANES):
            codes = weight.unpacked(part).codes
            codes = F.pad(codes, (0, 0, 0, part.stop - part.start - len(codes)))
            self.packed[_blocks(part)] = self._pack(codes)
        both = F.pad(torch.stack((weight.scale, weight.zero)), (0, 0, 0, padded - self.rows))
        by_block = both.view(2, padded // LANES, LANES, weight.groups)
        self.grid = by_block.permute(1, 3, 0, 2).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.columns)
        if self.few is None or rows.shape[0] <= self.few:
            narrow = rows if rows.dtype != torch.float64 else rows.float()
            y = torch.ops.stillhouse_cpu.product(
                narrow, self.packed, self.grid, self.rows, self.vnni
            ).to(x.dtype)
        elif torch.compiler.is_compiling():
            y = F.linear(rows, self.dequantize(x.dtype))
        else:
            y = rows.new_empty(rows.shape[0], self.rows)
            for part in row_chunks(self.rows, self.columns, x.device, LANES):
                y[:, part] = F.linear(rows, self._weight(part, x.dtype))
        return y.view(*x.shape[:-1], self.rows)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float64:
            return super().dequantize(dtype)
        return self._weight(slice(0, self.rows), dtype)

    def _weight(self, part: slice, dtype: torch.dtype) -> Tensor:
        """The weight's rows `part`, which starts at a whole block, in `dtype`."""
        like, blocks = torch.empty(0, dtype=dtype), _blocks(part)
        return torch.ops.stillhouse_cpu.dequantize(
            like, self.packed[blocks], self.grid[blocks], part.stop - part.start, self.columns
        )

    def unpacked(self) -> Codes:
        codes = torch.empty(len(self.packed) * LANES, self.columns, dtype=torch.uint8)
        for part in row_chunks(len(codes), self.columns, codes.device, LANES):
            codes[part] = self._unpack(self.packed[_blocks(part)])
        return Codes(codes[: self.rows], self.scale, self.zero, self.bits)

    def _pack(self, codes: Tensor) -> Tensor:
        """uint8 `[blocks, bytes]` of codes `[rows, columns]`, rows whole blocks."""
        if not self.narrow:
            return codes.view(-1, LANES, self.columns // 4, 4).transpose(1, 2).flatten(1)
        pairs = codes.view(-1, LANES, self.columns // 8, 2, 4)
        both = pairs[..., 0, :] | pairs[..., 1, :] << 4
        return both.transpose(1, 2).flatten(1)

    def _unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `_pack`."""
        found = packed.view(len(packed), -1, LANES, 4)
        if self.narrow:
            found = torch.stack((found & 15, found >> 4), -2)
        return found.transpose(1, 2).reshape(-1, self.columns)


def most_rows() -> int | None:
    """Rows of activations above which dequantizing and a matmul is faster; None: it never is
    (`tests.bench.kernels`). With AMX, where it was not measured, bfloat16 matmuls are nearly free.
    """
    return 48 if cpu_kind() == "amx" else None


def _blocks(rows: slice) -> slice:
    return slice(rows.start // LANES, -(-rows.stop // LANES))


# Of a product with inputs that are constant over groups or over the whole row, the worst there are.
# Beside it stand the kernel's other roundings, 0.3 %: together they stay below 1 %. Normal weights
# are at 0.5 % in groups of 64, and at 0.8 % in groups of 128.
TOLERANCE = 0.008
SAMPLE = 256  # rows, spread over the weight, on which it is estimated


@dataclass(frozen=True)
class Grid:
    """4-bit codes with `value = (code - 8) * scale + offset`, scale and offset per group.

    codes: uint8 `[rows, columns]`; scale, offset: float32 `[rows, groups]`.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor


def lost_offsets(weight: StoredWeight, offset: Tensor) -> Tensor | None:
    """float32 `[rows, groups]`: what bfloat16 rounds off the offsets that are added to the weights
    of each group; None where the product would not show it.

    offset: as a kernel has it, float32, with rows added as padding, and of a group that is several
    of the kernel's once for each.
    """
    exact = offset[: weight.rows, :: offset.shape[1] // weight.groups]
    lost = exact - exact.bfloat16().float()
    some = slice(0, weight.rows, max(1, weight.rows // SAMPLE))
    sums = weight.unpacked(some).dequantize().unflatten(1, (weight.groups, -1)).sum(-1)
    missed = weight.group_size * lost[some]
    # The two inputs: constant in each group with signs at random, and constant over all.
    for error, product in ((missed, sums), (missed.sum(1), sums.sum(1))):
        if not bool(error.norm() <= TOLERANCE * product.norm()):
            return lost
    return None


def on_grid(values: Tensor, size: int) -> Grid:
    """`values` float32 `[rows, n]` as columns of an int4 kernel with groups of `size`; columns are
    added to fill the last group. Within 1/30 of the range of a group's values."""
    rows, count = values.shape
    width = -(-count // size) * size
    # Of the columns that fill it up nothing is asked: repeats of the last leave the range alone.
    filled = torch.cat((values, values[:, -1:].expand(rows, width - count)), 1)
    groups = filled.unflatten(1, (-1, size))
    low, high = groups.aminmax(dim=-1)
    scale = (high - low) / 15
    steps = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    codes = ((groups - low.unsqueeze(-1)) / steps).round_().clamp_(0, 15)
    return Grid(codes.flatten(1).to(torch.uint8), scale, low + 8 * scale)
