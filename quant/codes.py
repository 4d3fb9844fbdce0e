"""A weight matrix in integer codes with one scale and zero point per group: the seam between the
methods that make codes and the layers, files and exports that use them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        wide = torch.promote_types(dtype, torch.float32)
        groups = self.codes.unflatten(1, (-1, self.group_size)).to(wide)
        weight = groups.sub_(self.zero.unsqueeze(-1)).mul_(self.scale.unsqueeze(-1))
        return weight.flatten(1).to(dtype)
