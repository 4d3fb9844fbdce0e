"""The base of the spec's sections."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A part of the spec: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        serialize_by_alias=True,
    )


def fault_at(key: str, why: str) -> PydanticCustomError:
    """The fault of a `key` of the section that a validator sees as a whole."""
    return PydanticCustomError("at_key", "{key}: {why}", {"key": key, "why": why})
