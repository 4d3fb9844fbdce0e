"""What a kernel is: a layout of one layer's weight, and the products with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.codes import Codes, pack, unpack


class Refused(ValueError):
    """A kernel cannot hold this weight; the message says why in a few words."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight `[rows, columns]` as files hold it: codes are packed (see `quant.codes`).

    activations: "int8" where the input is to be quantized to int8 per token, or None.
    shared: the codes stay where they are (an embedding's), so a layout of them comes on top.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    columns: int
    activations: str | None = None
    shared: bool = False

    @property
    def rows(self) -> int:
        return self.scale.shape[0]

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    @property
    def group_size(self) -> int:
        return self.columns // self.groups

    def unpacked(self, rows: slice = slice(None)) -> Codes:
        """The weight, or some of its rows, as unpacked codes."""
        return Codes(
            unpack(self.codes[rows], self.bits), self.scale[rows], self.zero[rows], self.bits
        )


class Kernel(ABC):
    """One layer's weight `[rows, columns]` in a layout of its own.

    Made of a `StoredWeight`, or refused (`Refused`) when the layout cannot hold it exactly. Holds
    the codes by itself, so that the packed ones can be let go, and gives them back as they were.
    """

    name: str  # what runs, for people

    def __init__(self, weight: StoredWeight) -> None:
        self.rows = weight.rows
        self.columns = weight.columns
        self.bits = weight.bits
        self.scale = weight.scale
        self.zero = weight.zero

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """`x W^T` for x `[..., columns]` of any float dtype, in that dtype; no gradients."""

    @abstractmethod
    def unpacked(self) -> Codes:
        """The weight as unpacked codes, the very ones that it was made of."""

    def codes(self) -> Tensor:
        """The codes as packed as a file holds them."""
        return pack(self.unpacked().codes, self.bits)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight `[rows, columns]` in `dtype`."""
        return self.unpacked().dequantize(dtype)


def kernel_group(group_size: int) -> int:
    """The largest group that int4 kernels know and that divides `group_size`; or `Refused`.

    A larger group is several of these with the same scale and zero point.
    """
    for size in (256, 128, 64, 32):
        if group_size % size == 0:
            return size
    raise Refused(f"groups of {group_size} do not fit the int4 kernel")


def repeated(scale: Tensor, zero: Tensor, group_size: int, padded: int) -> tuple[Tensor, Tensor]:
    """Scale and zero in float32, `[padded rows, groups]`, once per group of the kernel."""
    times = group_size // kernel_group(group_size)
    both = (part.float().repeat_interleave(times, 1) for part in (scale, zero))
    wide, offset = (F.pad(part, (0, 0, 0, padded - len(part))) for part in both)
    return wide, offset


def space_above(zero: Tensor, bits: int, top: int, middle: int) -> Tensor:
    """uint8 of zero's shape: how far each group's codes move up so that its zero point comes near
    `middle` and no code passes `top`. It follows from what is stored, so that it can be undone.
    """
    space = top - ((1 << bits) - 1)
    return (middle - zero.float().round()).clamp_(0, space).to(torch.uint8)
