"""What bfloat16 rounds off the offsets of an int4 kernel, and whether that would be seen.

The kernels add one bfloat16 offset `(8 - z) s` to all weights of a group. What is rounded off is
the same for the whole group: over inputs without a mean it averages out, over others it adds up,
most where one large weight has stretched its group's range and the others are small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.kernels.kernel import StoredWeight

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
