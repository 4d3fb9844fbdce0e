"""What a spec may hold: its JSON Schema, and one line for each thing that does not fit it."""

from __future__ import annotations

from typing import Any

from jobs.errors import SpecErrors
from jobs.spec import JobSpec, rule_faults
from trainer.spec.errors import SpecReader

_READER = SpecReader(JobSpec, rule_faults)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a spec, for editors and other tools."""
    schema = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def spec_of(data: dict[Any, Any]) -> JobSpec:
    """Validate plain data (what YAML gives).

    Raises:
        SpecErrors: with one line for each fault, all at once.
    """
    spec, lines = _READER.read(data)
    if spec is None:
        raise SpecErrors(lines)
    return spec
