"""The folder that a user means by MODEL: a cell of a run, a quantized or a plain model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.storage import Store, open_store
from jobs.errors import SpecErrors
from jobs.runs import cells_of, find_run, known_run, runs_there

Kind = Literal["artifact", "packed", "plain"]
DESCRIPTION, CONFIG = "quant.json", "config.json"


@dataclass(frozen=True)
class Found:
    """A model's local folder.

    kind: artifact (what `stillhouse quantize` and a sweep write), packed (a Hugging Face folder of
    quantized weights), plain (one of unquantized weights). run: where it is a cell's, else None.
    """

    name: str
    folder: Path
    kind: Kind
    run: Store | None = None
    cell: str | None = None


def find(
    name: str,
    storage: str,
    command: str,
    cell: str | None = None,
    revision: str | None = None,
) -> Found:
    """The model `name`: a folder, a URL, a hub id (at `revision`, or main), or a run with `cell`.

    Raises:
        SpecErrors: one line; there is none, or it is a run and `cell` names none of its cells, or
            it is no hub id and has a revision.
    """
    if cell is not None:
        _refuse_revision(f"the cell {cell} of {name}", revision)
        return _cell(name, find_run(name, storage, command), cell)
    try:
        return _found(name, storage, command, revision)
    except SpecErrors:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise SpecErrors([" ".join(str(error).split())]) from None


def _refuse_revision(what: str, revision: str | None) -> None:
    if revision is not None:
        raise SpecErrors(
            [f"--revision {revision}: {what} has none, only hub ids do; leave it away"]
        )


def _found(name: str, storage: str, command: str, revision: str | None) -> Found:
    path = Path(name).expanduser()
    if not name.strip():
        raise SpecErrors([f"MODEL: is empty; may be {_MAY_BE}"])
    if path.is_file():
        runner = "; llama.cpp and what is built on it run gguf files" * (path.suffix == ".gguf")
        raise SpecErrors([f"{name}: is a file; may be {_MAY_BE}{runner}"])
    if "://" in name:
        place = open_store(name)
        if place.exists(CONFIG):
            _refuse_revision(name, revision)
            return _of_folder(name, place.fetch_folder(""))
    elif (path / CONFIG).is_file() or (path / DESCRIPTION).is_file():
        _refuse_revision(name, revision)
        return _of_folder(name, path)
    root = open_store(storage)
    run = known_run(name, root)
    if run is not None:
        raise SpecErrors(
            [f"{name}: is a run; give --cell, one of {cells_of(run)}{_unquantized(run)}"]
        )
    if path.is_dir() or "://" in name:
        raise SpecErrors([f"{name}: holds no {CONFIG}; may be {_MAY_BE}"])
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        there = runs_there(name, root, storage)
        raise SpecErrors([f"{name}: no such folder; may be {_MAY_BE}; {there}"])
    from trainer.models.load import find_model

    return _of_folder(name, find_model("MODEL", name, revision or "main"))


_MAY_BE = "a model's folder or URL, a run with --cell, or a hub id such as Qwen/Qwen3-0.6B"


def _of_folder(name: str, folder: Path) -> Found:
    return Found(name, folder, _kind(folder))


def _kind(folder: Path) -> Kind:
    if (folder / DESCRIPTION).is_file():
        return "artifact"
    return "packed" if quantization_of(folder) else "plain"


def quantization_of(folder: Path) -> dict[str, Any]:
    """What config.json says of its weights' quantization; {} of a plain model.

    Raises ValueError, one line, when it is not JSON.
    """
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no mapping; give a model's folder")
    found = values.get("quantization_config") or {}
    return found if isinstance(found, dict) else {}


def _cell(name: str, run: Store, cell: str) -> Found:
    cells = cells_of(run)
    if cell in cells.without:
        others = f", or give one of {', '.join(cells.models)}" if cells.models else ""
        why = f"{cells.without[cell]}; run the sweep again{others}"
        raise SpecErrors([f"--cell {cell}: {why}"])
    if cell not in cells.models:
        raise SpecErrors([f"--cell {cell}: {name} has no such cell; may be one of {cells}"])
    folder = run.fetch_folder(f"cells/{cell}/model")
    return Found(f"{name} {cell}", folder, "artifact", run, cell)


def _unquantized(run: Store) -> str:
    student = run.path("student")
    return f"; its 16-bit model is {student}" if run.exists(f"student/{CONFIG}") else ""
