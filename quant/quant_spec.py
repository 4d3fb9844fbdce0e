"""`QuantSpec`: how one model is quantized."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

BITS = (8, 6, 5, 4, 3, 2, 1)
Method = Literal["hqq", "rtn", "int8-dynamic"]
METHODS: tuple[Method, ...] = ("hqq", "rtn", "int8-dynamic")
CHANNEL: Literal["channel"] = "channel"  # one scale per row (output channel)
GroupSize = int | Literal["channel"]
DYNAMIC = "int8-dynamic"
AUTO_GROUP_SIZES = (128, 64, 32, 16, 8)  # what group sizes are chosen from where none is given


@dataclass(frozen=True)
class QuantSpec:
    """How one model is quantized.

    bits: per code, one of `BITS`. group_size: weights per scale and zero point, a multiple of 8,
    or "channel" for one per row. method: "hqq" (half-quadratic optimization of the zero points,
    mobiusml.github.io/hqq_blog), "rtn" (round to nearest between each group's extremes) or
    "int8-dynamic" (weights in int8 per row, activations in int8 per token, at run time).
    embeddings, head: quantize the input embeddings and the output head too; where the two are
    tied they share one set of codes and are asked for together.

    Raises ValueError (one line) for a combination that is not offered.
    """

    bits: int
    group_size: GroupSize
    method: str = "hqq"
    embeddings: bool = False
    head: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown; may be {', '.join(METHODS)}")
        if type(self.bits) is not int or self.bits not in BITS:  # True is 1 to Python
            raise ValueError(
                f"{self.bits!r} bits are not offered by {self.method}; may be {list(BITS)}"
            )
        size = self.group_size
        if size != CHANNEL and not is_group_size(size):
            raise ValueError(
                f"group_size {size!r} is none; may be a multiple of 8, from 8 on, or {CHANNEL}"
            )
        if self.method == DYNAMIC and (self.bits, size) != (8, CHANNEL):
            raise ValueError(
                f"{DYNAMIC} has 8 bits and one scale per channel, not {self.bits} bits and "
                f"group_size {size}; say bits 8 and group_size {CHANNEL}"
            )
        for name in ("embeddings", "head"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}; may be True or False")

    @property
    def key(self) -> str:
        """Readable name of the cell, e.g. ``hqq-4b-g64``, ``rtn-4b-channel-embeddings-head``."""
        size = self.group_size if self.group_size == CHANNEL else f"g{self.group_size}"
        extra = "-embeddings" * self.embeddings + "-head" * self.head
        return f"{self.method}-{self.bits}b-{size}{extra}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_group_size(size: object) -> bool:
    """Whether `size` is a number of weights that a group may have: a multiple of 8, from 8 on."""
    return type(size) is int and size >= 8 and size % 8 == 0


def fitting_group_sizes(widths: Iterable[int]) -> list[int]:
    """The two largest of `AUTO_GROUP_SIZES` that divide all `widths`, the smaller one first.

    widths: input widths of the layers. Where none divides them: the smallest, which is then refused
    with the layer that it does not fit.
    """
    common = math.gcd(*widths)
    found = [size for size in AUTO_GROUP_SIZES if common % size == 0][:2]
    return sorted(found) or [AUTO_GROUP_SIZES[-1]]
