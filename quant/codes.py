"""A weight matrix in integer codes with one scale and zero point per group: the seam between the
methods that make codes and the layers, files and exports that use them."""

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
