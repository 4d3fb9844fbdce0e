"""torch's int4 kernel on a CPU: 4-bit codes in one plane, 8-bit codes in two.

The kernel computes `x ((q - 8) s + zp)^T` for q in 0..15 with s and zp in bfloat16 (torch, ATen's
int4mm_kernel.cpp), so with `zp = (8 - z) s` it takes fractional zero points as they are. A code of
up to 8 bits is `q = 16 hi + lo`, hence `(q - z) s = (hi - 8) 16 s + (lo - 8) s + (136 - z) s`: one
kernel over twice the columns, with the input repeated; the last term is split over the two.
Codes of fewer bits leave room: each group's codes, and its z with them, are moved up so that z is
near the middle of 0..15 or 0..255. zp is then near 0, and what bfloat16 rounds off s and zp is
small beside the weights (else it is not: most weights of 1-bit groups are 0.02 s). 4-bit codes
leave none: where what is rounded off their zp would be seen, more columns hold it (`offsets`).

`torch.ops.aten._convert_weight_to_int4pack_for_cpu` keeps rows in blocks (of 64 with AVX-512, 32
with AVX2): `[rows / block, columns, block / 2]` bytes, each with the codes of two rows. Which two
depends on the processor, so it is found out by packing the rows' own numbers, never assumed, and
every weight's way there and back is checked when it is converted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.codes import Codes, row_chunks, scaled
from quant.kernels.blocks import Grid, lost_offsets, on_grid
from quant.kernels.kernel import Kernel, Refused, StoredWeight, kernel_group, repeated, space_above

ROWS = 64  # rows are padded to a multiple of this, which every block size divides


@dataclass(frozen=True)
class Int4Layout:
    """block: rows per block; order: int64 `[block]`, the row that each nibble holds when the low
    nibbles of a block's bytes are read before the high ones, or None when that is 0, 1, 2, ..."""

    block: int
    order: Tensor | None

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 `[rows, columns / 2]` of codes `[rows, columns]` below 16, rows whole `ROWS`.

        Raises Refused when the codes do not come back as they were.
        """
        packed = _pack(codes)
        if not torch.equal(self.unpack(packed), codes):
            raise Refused("this processor's int4 layout is not understood")
        return packed

    def nibbles(self, packed: Tensor) -> Tensor:
        """The codes of packed rows as `[rows / block, columns, block]`."""
        rows, half = packed.shape
        bytes_ = packed.view(rows // self.block, 2 * half, self.block // 2)
        found = torch.cat((bytes_ & 15, bytes_ >> 4), -1)
        return found if self.order is None else found[..., self.order.argsort()]

    def unpack(self, packed: Tensor) -> Tensor:
        """Codes uint8 `[rows, columns]` of packed ones; the inverse of `pack`."""
        return self.nibbles(packed).transpose(1, 2).flatten(0, 1).contiguous()


def find_layout() -> Int4Layout:
    """The layout on this processor. Raises Refused when it is none that is known."""
    numbers = torch.arange(ROWS, dtype=torch.uint8).unsqueeze(1).expand(ROWS, 32)
    low, high = (_pack(part.contiguous()).flatten() for part in (numbers & 15, numbers >> 4))
    first = low & 15 | (high & 15) << 4
    second = low >> 4 | high & 240
    for block in (64, 32, 16):
        shape = (ROWS // block, 32, block // 2)
        rows = torch.cat((first.view(shape), second.view(shape)), -1)
        rows = rows.long() - torch.arange(0, ROWS, block).view(-1, 1, 1)
        order = rows[0, 0]
        whole = torch.arange(block)
        if bool((rows == order).all()) and torch.equal(order.sort().values, whole):
            return Int4Layout(block, None if torch.equal(order, whole) else order)
    raise Refused("this processor's int4 layout is not known")


def _pack(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)


# Above this many rows the weight is dequantized and multiplied in 16 bits. Milliseconds on one
# thread (AVX-512), 2048 -> 5632, groups of 64: the kernel takes 0.13 a row (two planes: 0.27), the
# other way 6.0 (8.0) + a matmul of 2.8 for 40 and 4.0 for 64 rows. They meet at 75 (39) rows; at
# 50 (30) where AMX makes the matmul nearly free. Between the two:
FEW = {1: 56, 2: 32}


class Int4(Kernel):
    """The weight in the int4 kernel's layout, `planes` codes of 4 bits for each code.

    Few rows of x go through the kernel; for many the same scales and zero points that are stored
    give the same weight as the plain path's, in chunks of rows.
    """

    def __init__(self, weight: StoredWeight) -> None:
        super().__init__(weight)
        planes = self.planes = 1 if weight.bits <= 4 else 2
        self.group = kernel_group(weight.group_size)
        self.few = FEW[planes]
        self.middle = 8 if planes == 1 else 136  # of 16 hi + lo
        self.layout = find_layout()
        kind = "int4" if planes == 1 else "int8 in two int4 planes"
        self.name = f"{kind} to {self.few} rows, then dequantize+matmul"
        padded = self.padded = -(-self.rows // ROWS) * ROWS
        centre = self.zero.float() + self._moved(slice(0, self.rows))
        s, z = repeated(self.scale, centre, weight.group_size, padded)
        s = s.bfloat16().float()  # as the kernel has it, so that codes near z are near 0 there too
        rest = (self.middle - z) * s
        if planes == 1:
            layout = [(s, rest)]
        else:
            high = rest.bfloat16().float()
            layout = [(16 * s, high), (s, rest - high)]
        more = self._corrections(weight, rest) if planes == 1 else None
        self.summed = 0  # columns behind those of the weight, whose inputs are the groups' sums
        if more is not None:
            self.summed = more.codes.shape[1]
            layout.append((more.scale, more.offset))
        self.scales_and_zeros = torch.cat([_per_group(*pair) for pair in layout])
        if not bool(self.scales_and_zeros.isfinite().all()):
            raise Refused("a scale or zero point is not finite")
        width = planes * self.columns + self.summed
        self.packed = torch.empty(padded, width // 2, dtype=torch.uint8)
        for part in row_chunks(padded, width, self.packed.device, ROWS):
            codes = F.pad(weight.unpacked(part).codes, (0, 0, 0, max(0, part.stop - self.rows)))
            codes = codes + self._moved(part).repeat_interleave(weight.group_size, 1)
            both = codes if planes == 1 else torch.cat((codes >> 4, codes & 15), 1)
            if more is not None:
                both = torch.cat((both, more.codes[part]), 1)
            self.packed[part] = self.layout.pack(both)

    def _corrections(self, weight: StoredWeight, rest: Tensor) -> Grid | None:
        """What is rounded off the kernel's offsets `rest`, as columns of the kernel."""
        lost = lost_offsets(weight, rest)
        if lost is None:
            return None
        return on_grid(F.pad(lost, (0, 0, 0, self.padded - self.rows)), self.group)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.columns)
        if rows.shape[0] <= self.few:
            y = self._few(rows)
        elif torch.compiler.is_compiling():  # one fused expression instead of a loop of many ops
            y = F.linear(rows, self._whole(x.dtype))
        else:
            y = self._many(rows)
        return y.view(*x.shape[:-1], self.rows)

    def _few(self, x: Tensor) -> Tensor:
        # The kernel's own bfloat16 path is 50 times as fast as its float32 and float16 ones.
        narrow = x if x.dtype is torch.bfloat16 else x.to(torch.bfloat16)
        if self.planes == 2:
            stacked = torch.cat((narrow, narrow), 1)
        elif self.summed:
            sums = narrow.unflatten(1, (self.scale.shape[1], -1)).sum(-1)
            stacked = torch.cat((narrow, F.pad(sums, (0, self.summed - sums.shape[1]))), 1)
        else:
            stacked = narrow.contiguous()
        y = torch._weight_int4pack_mm_for_cpu(
            stacked, self.packed, self.group, self.scales_and_zeros
        )
        if self.padded != self.rows:
            y = y[:, : self.rows].contiguous()
        return y if x.dtype is torch.bfloat16 else y.to(x.dtype)

    def _many(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], self.rows)
        for part in row_chunks(self.rows, self.columns, x.device, ROWS):
            y[:, part] = torch.mm(x, self._transposed(part, x.dtype))
        return y

    def _transposed(self, part: slice, dtype: torch.dtype) -> Tensor:
        """`W[part]^T` `[columns, rows]` in `dtype`; the part starts at a whole block."""
        block, count = self.layout.block, part.stop - part.start
        whole = -(-count // block) * block
        codes = self._codes(slice(part.start, part.start + whole))
        groups, blocks = self.scale.shape[1], whole // block
        wide = torch.promote_types(dtype, torch.float32)
        value = codes.view(blocks, groups, -1, block).to(wide)
        for source, change in ((self.zero, value.sub_), (self.scale, value.mul_)):
            rows = F.pad(source[part], (0, 0, 0, whole - count)).view(blocks, block, groups, 1)
            change(rows.permute(0, 2, 3, 1).to(wide).contiguous())
        weight = torch.empty(self.columns, whole, dtype=dtype)
        weight.view(-1, blocks, block).transpose(0, 1).copy_(value.view(blocks, -1, block))
        return weight[:, :count]

    def _codes(self, rows: slice) -> Tensor:
        """Codes `[blocks, columns, block]` of these rows (whole blocks)."""
        found = self.layout.nibbles(self.packed[rows])
        if self.planes == 2:
            found = found[:, : self.columns] << 4 | found[:, self.columns :]
        elif self.summed:
            found = found[:, : self.columns]
        if self.bits in (4, 8):
            return found
        # Contiguous: an inner loop with a stride is not vectorized and takes 10 times as long.
        moved = self._moved(rows).view(len(found), self.layout.block, -1, 1)
        moved = moved.permute(0, 2, 3, 1).contiguous()
        groups = found.unflatten(1, (moved.shape[1], -1))
        return (groups - moved).flatten(1, 2)

    def _moved(self, rows: slice) -> Tensor:
        """uint8 `[rows, groups]`: how far the codes of each group are moved up; 0 for padding."""
        top = 15 if self.planes == 1 else 255
        moved = space_above(self.zero[rows], self.bits, top, self.middle)
        return F.pad(moved, (0, 0, 0, max(0, rows.stop - self.rows)))

    def _whole(self, dtype: torch.dtype) -> Tensor:
        codes = self._codes(slice(0, self.padded)).transpose(1, 2).flatten(0, 1)[: self.rows]
        return scaled(codes, self.scale, self.zero, dtype)

    def unpacked(self) -> Codes:
        codes = torch.empty(self.padded, self.columns, dtype=torch.uint8)
        for part in row_chunks(self.padded, self.columns, codes.device, ROWS):
            codes[part] = self._codes(part).transpose(1, 2).flatten(0, 1)
        return Codes(codes[: self.rows], self.scale, self.zero, self.bits)


def _per_group(scale: Tensor, zero: Tensor) -> Tensor:
    """bfloat16 `[groups, rows, 2]` of two `[rows, groups]`."""
    return torch.stack((scale, zero), -1).transpose(0, 1).contiguous().to(torch.bfloat16)
