"""The spec section of the sweep, and `QuantSpec`: one point of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

BITS = (8, 6, 5, 4, 3, 2, 1)
Method = Literal["hqq", "rtn", "int8-dynamic"]
METHODS: tuple[Method, ...] = ("hqq", "rtn", "int8-dynamic")
CHANNEL: Literal["channel"] = "channel"  # one scale per row (output channel)
GroupSize = int | Literal["channel"]
DYNAMIC = "int8-dynamic"
WholeNumber = Annotated[int, Field(strict=True)]  # else pydantic takes true for 1


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


class SweepSpec(BaseModel):
    """The grid of quantized models: every method with every width and group size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: list[WholeNumber] = Field(
        default=[8, 4, 3, 2],
        min_length=1,
        description=f"Code widths in bits, each one of {', '.join(map(str, BITS))}.",
    )
    group_size: list[WholeNumber | Literal["channel"]] = Field(
        default=[64, 128],
        min_length=1,
        description="Weights that share one scale and zero point: multiples of 8 that divide the "
        "input width of every quantized layer, or channel: one scale per output channel.",
    )
    methods: list[Method] = Field(
        default=["hqq"],
        min_length=1,
        description="Quantizers. hqq: half-quadratic optimization of the zero points. rtn: round "
        "to nearest, the baseline. int8-dynamic: weights in int8 per channel, activations in int8 "
        "per token; one cell, whatever bits and group_size are.",
    )
    embeddings: bool = Field(
        False,
        description="Quantize the input embeddings too. Where they are tied to the head: together "
        "with head only.",
    )
    head: bool = Field(
        False,
        description="Quantize the output head too. Where it is tied to the embeddings: together "
        "with embeddings only.",
    )
    keep_16bit: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description="Modules that stay in 16 bits in every cell: names or globs, which hold for "
        "all inside a module, e.g. '*.experts*'. What cannot be quantized must be listed.",
    )
    batch_sequences: WholeNumber = Field(
        8,
        ge=1,
        description="Sequences per evaluation batch. Fixed and recorded: results may change "
        "in the last digits with it.",
    )
    speed_prompt_tokens: WholeNumber = Field(
        128, ge=1, description="Prompt length in tokens of the speed measurement."
    )
    speed_decode_tokens: WholeNumber = Field(
        32, ge=2, description="Tokens generated in the speed measurement."
    )

    @field_validator("bits")
    @classmethod
    def _bits_offered(cls, value: list[int]) -> list[int]:
        wrong = [bits for bits in value if bits not in BITS]
        if wrong:
            text = ", ".join(map(str, wrong))
            raise ValueError(f"{text} bits are not offered; may be {list(BITS)}")
        return _unique(value)

    @field_validator("group_size")
    @classmethod
    def _group_sizes(cls, value: list[GroupSize]) -> list[GroupSize]:
        wrong = [size for size in value if size != CHANNEL and not is_group_size(size)]
        if wrong:
            text = ", ".join(map(str, wrong))
            raise ValueError(
                f"{text} is no group size; may be a multiple of 8, from 8 on, or {CHANNEL}"
            )
        return _unique(value)

    @field_validator("methods")
    @classmethod
    def _methods_unique(cls, value: list[str]) -> list[str]:
        return _unique(value)

    def cells(self) -> list[QuantSpec]:
        """All cells of the grid, in the order they are listed in the spec; none twice."""
        grid = [
            (8, CHANNEL, method) if method == DYNAMIC else (bits, size, method)
            for method in self.methods
            for bits in self.bits
            for size in self.group_size
        ]
        return [
            QuantSpec(bits, size, method, self.embeddings, self.head)
            for bits, size, method in dict.fromkeys(grid)
        ]


def _unique(value: list[Any]) -> list[Any]:
    repeated = [item for item in dict.fromkeys(value) if value.count(item) > 1]
    if repeated:
        raise ValueError(f"repeated cells: {repeated} listed more than once; list each once")
    return value
