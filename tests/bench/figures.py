"""Where figures are kept: `results/<bench>/<kind>.json`, one file for each kind of processor.

kind: `trainer.processor.processor_kind`, avx2 | avx512 | avx512_bf16 | amx | neon | generic, or the
GPU's name. So those of several kinds stand side by side, and none replaces another's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.processor import processor_kind, processor_name

FOLDER = Path(__file__).parent / "results"
Json = dict[str, Any]


def result_file(bench: str, device: str = "cpu", folder: Path = FOLDER) -> Path:
    """The file of a bench's figures on this machine's processor, or on one of its GPUs."""
    return folder / bench / f"{processor_kind(device)}.json"


def read_result(path: Path) -> Json:
    """The figures in a file; {} where there is none."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def write_result(path: Path, found: Json) -> None:
    """Keeps figures in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")


def machine() -> Json:
    """The processor that figures are measured on."""
    return {"processor": processor_name(), "kind": processor_kind(), "cpus": os.cpu_count()}


def results_by_kind(bench: str, folder: Path = FOLDER) -> dict[str, Json]:
    """What there is of a bench, by kind of processor, in the order of their names."""
    return {path.stem: read_result(path) for path in sorted((folder / bench).glob("*.json"))}


def tables_by_kind(
    bench: str, tables: Callable[[Json], dict[str, str]], folder: Path = FOLDER
) -> dict[str, str]:
    """A page's tables by name: those of every kind one below the other, under the kind's name.

    tables: of one kind's figures, by name. Kinds whose table is the same share it.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for kind, figures in results_by_kind(bench, folder).items():
        for name, table in tables(figures).items():
            found.setdefault(name, {}).setdefault(table, []).append(kind)
    return {
        name: "\n\n".join(f"On {', '.join(kinds)}:\n\n{table}" for table, kinds in by.items())
        for name, by in found.items()
    }
