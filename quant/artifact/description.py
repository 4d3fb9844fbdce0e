"""`quant.json`: what the tensors of a quantized model are, and the rules it must keep.

format       2
spec         the QuantSpec it was made with; dtype: of what is not quantized
layers       each quantized layer by name: kind (linear or embedding), bits, group_size (the row's
             width if per channel), rows, columns, bias, activations (int8 or null), method
tied         a tensor or layer -> the one whose values it shares. A name that is a layer of its own
             too is a head that shares an embedding's codes
computed     buffers that are not stored but computed from the config -> their dtype
bytes        of all tensors; parameters: number of weights; meta: whatever the caller kept
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster.storage.strict_json import broken, read_object, shown
from quant.artifact.safetensors_file import NAME
from quant.codes import BLOCK
from quant.quant_spec import BITS, Method, QuantSpec

FORMAT = 2
DESCRIPTION, WEIGHTS = "quant.json", "quantized.safetensors"
AGAIN = "quantize the model again or copy the whole folder again"

FloatName = Literal["bfloat16", "float16", "float32", "float64"]
DtypeName = Literal[
    "bfloat16", "float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SpecEntry(_Strict):
    """The QuantSpec of the file, whose own rules are the check."""

    bits: int
    group_size: int | Literal["channel"]
    method: Method
    embeddings: bool
    head: bool

    @model_validator(mode="after")
    def _is_offered(self) -> Self:
        self.spec()
        return self

    def spec(self) -> QuantSpec:
        return QuantSpec(**self.model_dump())


class LayerEntry(_Strict):
    """One quantized layer."""

    kind: Literal["linear", "embedding"]
    bits: int
    group_size: int = Field(ge=1)
    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    bias: bool
    activations: Literal["int8"] | None
    method: Method

    @model_validator(mode="after")
    def _widths_fit(self) -> Self:
        if self.bits not in BITS:
            raise ValueError(f"{shown(self.bits)} bits are not offered; may be {list(BITS)}")
        if self.columns % BLOCK:
            raise ValueError(
                f"{shown(self.columns)} columns are not offered; must be a multiple of {BLOCK}"
            )
        if self.columns % self.group_size:
            raise ValueError(
                f"group_size {shown(self.group_size)} does not divide the "
                f"{shown(self.columns)} columns"
            )
        if self.kind == "embedding" and (self.bias or self.activations):
            raise ValueError("an embedding has neither bias nor activations")
        if self.activations == "int8" and (self.bits != 8 or self.group_size != self.columns):
            raise ValueError(
                f"activations in int8 go with 8 bits and one group per row, not {self.bits} bits "
                f"and groups of {shown(self.group_size)}"
            )
        return self


class Description(_Strict):
    """The whole file."""

    format: Literal[2]
    spec: SpecEntry
    dtype: FloatName
    layers: dict[str, LayerEntry] = Field(min_length=1)
    tied: dict[str, str]
    computed: dict[str, DtypeName]
    meta: dict[str, Any]
    bytes: int = Field(ge=0)
    parameters: int = Field(ge=1)

    @field_validator("layers", "tied", "computed")
    @classmethod
    def _names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if len(name) > 512 or not NAME.fullmatch(name):
                raise ValueError(f"{shown(name)} is no name; must be like model.layers.0.mlp")
        return value

    @model_validator(mode="after")
    def _ties_lead_somewhere(self) -> Self:
        for name, kept in self.tied.items():
            alias = kept in self.layers and name not in self.layers
            if kept in self.tied and not alias:
                raise ValueError(f"tied: {name} leads to {kept}, which is tied itself")
            if name in self.layers:
                head, table = self.layers[name], self.layers.get(kept)
                same = ("bits", "group_size", "rows", "columns")
                if (
                    table is None
                    or (head.kind, table.kind) != ("linear", "embedding")
                    or any(getattr(head, key) != getattr(table, key) for key in same)
                ):
                    raise ValueError(
                        f"tied: {name} must lead to an embedding in layers of the same {same}, "
                        f"and leads to {shown(kept)}"
                    )
        return self

    def shares(self) -> dict[str, str]:
        """Heads that share an embedding's codes -> that embedding."""
        return {name: kept for name, kept in self.tied.items() if name in self.layers}

    def aliases(self) -> dict[str, str]:
        """Other names of a quantized layer -> the name it has in `layers`."""
        return {
            name: kept
            for name, kept in self.tied.items()
            if kept in self.layers and name not in self.layers
        }

    def tied_tensors(self) -> dict[str, str]:
        """Tensors outside of quantized layers -> the tensor of the file that they are."""
        return {name: kept for name, kept in self.tied.items() if kept not in self.layers}


def parse_description(found: dict[str, Any], path: Path) -> Description:
    """A quant.json's content, checked. Raises ValueError (one line: what, where, a way out)."""
    check_format(found.get("format"), path)
    try:
        return Description(**found)
    except ValidationError as error:
        raise broken(path, f"{_first(error)}; {AGAIN}") from None
    except TypeError:  # a key that is no Python name is none of ours either
        odd = sorted(set(found) - set(Description.model_fields))
        raise broken(path, f"unknown key {shown(odd[0])}; {AGAIN}") from None


def check_format(found: object, path: Path) -> None:
    """Raise ValueError unless this program reads artifacts of format `found`."""
    if type(found) is int and found > FORMAT:
        raise broken(
            path, f"it has format {shown(found)}, this program reads {FORMAT}: update stillhouse"
        )
    if found == FORMAT and type(found) is int:
        return
    if found == 1 and type(found) is int:
        raise broken(
            path, f"it has format 1, this program reads {FORMAT}: quantize the model again"
        )
    state = "no format" if found is None else f"format {shown(found)}"
    raise broken(path, f"it has {state}, must be the number {FORMAT}; {AGAIN}")


def read_description(folder: str | Path) -> dict[str, Any]:
    """The content of an artifact's quant.json, checked; its tensors are not looked at.

    Raises ValueError (one line) when it is missing, of another format version or not well formed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise broken(folder, "there is no such folder; name one that holds a quantized model")
    path = folder / DESCRIPTION
    if not path.is_file():
        raise broken(
            folder,
            f"it is no quantized model: it has no {DESCRIPTION}; `stillhouse quantize` makes one",
        )
    found = read_object(path)
    parse_description(found, path)
    return found


def _first(error: ValidationError) -> str:
    """The first of pydantic's findings on one line: the key, what is wrong, what it got."""
    findings = error.errors(include_url=False, include_context=False)
    first = findings[0]
    where = ".".join(str(part) for part in first["loc"])[:200]
    text = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] in ("value_error", "missing") else f" and is {shown(first['input'])}"
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return f"{where or 'it'}: {text}{got}{more}"
