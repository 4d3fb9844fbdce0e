"""The spec section of the sweep, and `QuantSpec`: one point of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

BITS = (8, 6, 5, 4, 3, 2, 1)
METHODS = ("hqq",)


@dataclass(frozen=True, order=True)
class QuantSpec:
    """How one model is quantized: `bits` per code, weights per scale (`group_size`), method."""

    bits: int
    group_size: int
    method: str = "hqq"

    @property
    def key(self) -> str:
        """Readable name of the cell, e.g. ``hqq-4b-g64``."""
        return f"{self.method}-{self.bits}b-g{self.group_size}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SweepSpec(BaseModel):
    """The grid of quantized models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: list[int] = Field(
        default=[8, 4, 3, 2],
        min_length=1,
        description=f"Code widths in bits, each one of {', '.join(map(str, BITS))}.",
    )
    group_size: list[int] = Field(
        default=[64, 128],
        min_length=1,
        description="Weights that share one scale and zero point. Must divide the input width "
        "of every linear layer of the model.",
    )
    methods: list[Literal["hqq"]] = Field(
        default=["hqq"], min_length=1, description="Quantizers: hqq."
    )
    batch_sequences: int = Field(
        8,
        ge=1,
        description="Sequences per evaluation batch. Fixed and recorded: results may change "
        "in the last digits with it.",
    )
    speed_prompt_tokens: int = Field(
        128, ge=1, description="Prompt length in tokens of the speed measurement."
    )
    speed_decode_tokens: int = Field(
        32, ge=2, description="Tokens generated in the speed measurement."
    )

    @field_validator("bits")
    @classmethod
    def _bits_offered(cls, value: list[int]) -> list[int]:
        wrong = [bits for bits in value if bits not in BITS]
        if wrong:
            text = ", ".join(map(str, wrong))
            raise ValueError(f"{text} bits are not offered by hqq; may be {list(BITS)}")
        return _unique(value)

    @field_validator("group_size")
    @classmethod
    def _group_sizes(cls, value: list[int]) -> list[int]:
        wrong = [size for size in value if size < 8 or size % 8]
        if wrong:
            text = ", ".join(map(str, wrong))
            raise ValueError(f"{text} is no group size; may be a multiple of 8, from 8 on")
        return _unique(value)

    @field_validator("methods")
    @classmethod
    def _methods_unique(cls, value: list[str]) -> list[str]:
        return _unique(value)

    def cells(self) -> list[QuantSpec]:
        """All cells of the grid, in the order they are listed in the spec."""
        return [
            QuantSpec(bits, size, method)
            for method in self.methods
            for bits in self.bits
            for size in self.group_size
        ]


def _unique(value: list[Any]) -> list[Any]:
    repeated = sorted({item for item in value if value.count(item) > 1})
    if repeated:
        raise ValueError(f"repeated cells: {repeated} listed more than once; list each once")
    return value
