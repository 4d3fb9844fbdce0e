"""The order in which a CPU's int4 kernel wants its codes, and back.

`torch.ops.aten._convert_weight_to_int4pack_for_cpu` keeps rows in blocks (of 64 with AVX-512, 32
with AVX2): `[rows / block, columns, block / 2]` bytes, each with the codes of two rows. Which two
depends on the processor, so it is found out by packing the rows' own numbers, never assumed, and
every weight's way there and back is checked when it is converted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.kernels.kernel import Refused

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
