"""`stillhouse quantize` without --out: the sweep of a model that exists, as a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.errors import SpecErrors
from jobs.groupsizes import SINGLE
from jobs.models.find import Found
from jobs.models.options import Grid
from jobs.models.quantize import fitted, kept_line
from jobs.spec import JobSpec
from quant.quant_spec import QuantSpec

DATA = "builtin:python-docs"
# Of text that the models are measured on; a run that is worth more time may ask for more.
SEQUENCES, TOKENS = 32, 512
PROMPT_TOKENS, DECODE_TOKENS = 128, 32


def sweep_spec(
    found: Found,
    grid: Grid,
    *,
    data: str | None,
    name: str | None,
    storage: str,
    revision: str | None,
    overrides: Sequence[str] = (),
) -> JobSpec:
    """The job that quantizes the model over the grid and measures every cell; no training.

    Sequences are as long as the model's positions allow, up to 512 tokens. `overrides` are
    ``dotted.key=value`` pairs, as in `jobs.load.load_spec`. Raises SpecErrors, a line per fault.
    """
    from jobs.schema import spec_of
    from trainer.models.load import max_length, read_config
    from trainer.spec.yaml import apply_override

    positions = max_length(read_config(found.folder)) or TOKENS
    section = grid.section()
    if not grid.group_sizes:
        model = QuantSpec(8, SINGLE, "hqq", grid.embeddings, grid.head)
        section["group_size"] = [fitted(found.folder, model).group_size]
    if positions < PROMPT_TOKENS + DECODE_TOKENS:
        decode = max(2, min(DECODE_TOKENS, positions // 4))
        section["speed_decode_tokens"] = decode
        section["speed_prompt_tokens"] = max(1, min(PROMPT_TOKENS, positions - decode))
    values: dict[Any, Any] = {
        "name": name or run_name(found.name),
        "storage": storage,
        "teacher": None,
        "student": {"model": found.name, "revision": revision or "main"},
        "data": {
            "train": [{"source": data or DATA}],
            "sequence_length": min(positions, TOKENS),
            "select_sequences": 16,
            "report_sequences": SEQUENCES,
        },
        "distill": None,
        "sweep": section,
    }
    faults = [fault for override in overrides if (fault := apply_override(values, override))]
    try:
        spec = spec_of(values)
    except SpecErrors as error:
        raise SpecErrors([*faults, *error.faults]) from None
    if faults:
        raise SpecErrors(faults)
    return spec


def kept_of(found: Found, spec: JobSpec) -> list[str]:
    """What share of the bytes stays in 16 bits in the smallest cell of the job; one line.

    None for a model that cannot be quantized, which the job's checks refuse.
    """
    assert spec.sweep is not None
    cells = spec.sweep.cells()
    try:
        return [kept_line(found.folder, min(cells, key=lambda cell: cell.bits))]
    except ValueError:
        return []


def run_name(model: str) -> str:
    """A valid run name for a model: its last telling part, e.g. qwen3-0.6b-quantized."""
    parts = [part for part in re.split(r"[/\\\\]", str(_absolute(model))) if part]
    last = parts[-1] if parts else "model"
    if last in ("student", "control") and len(parts) > 1:
        last = parts[-2]
    slug = re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._")[:50].rstrip("-._")
    return f"{slug or 'model'}-quantized"


def _absolute(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.resolve()) if "://" not in model and path.exists() else model
