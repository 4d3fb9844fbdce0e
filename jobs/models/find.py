"""Finds the model that a user means (a cell, a quantized or a plain model) and loads it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.storage import Store, open_store
from jobs.errors import SpecErrors
from jobs.run.directory import cells_of, find_run, known_run, runs_there
from trainer.corpus.tokenizer import has_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


class OutOfMemory(OSError):
    """The GPU or the machine has too little memory (exit code 3): one line."""


@contextlib.contextmanager
def enough_memory(name: str) -> Iterator[None]:
    """Raises OutOfMemory, one line, where the block finds no memory for the model `name`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        short = short_of_memory(error)
        if short is None:
            raise
        mend = "give --device cpu, or " if short == "the GPU" else ""
        raise OutOfMemory(
            f"{name}: {short} has too little memory for it; {mend}end what else it runs"
        ) from None


def short_of_memory(error: BaseException | None) -> str | None:
    """Whose memory an error or its cause says is too little, None where it says nothing so."""
    import torch

    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return "the GPU"
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return "this machine"
        error = error.__cause__
    return None


def quiet() -> None:
    """No bars and hints of transformers on the terminal; faults are raised all the same."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(found: Found) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder. Raises ValueError, one line, with the mend."""
    from transformers import AutoTokenizer

    folder = found.folder
    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder}/tokenizer.json: is not there; copy tokenizer.json and tokenizer_config.json "
            "of the model that this one was made from into the folder"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # it raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({reason})") from None


def compute_dtype(asked: str, device: str) -> torch.dtype:
    """The torch dtype of a `--dtype`; auto is what the device is fast at."""
    import torch

    from trainer.processor import fast_dtype

    found: torch.dtype = getattr(torch, fast_dtype(device) if asked == "auto" else asked)
    return found


def load_unquantized(
    folder: Path, device: str, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A plain model on the CPU or a GPU. dtype: None: that it is stored in.

    Raises ValueError, one line, if its weights are not those of its config.
    """
    from trainer.models.load import load_for_inference

    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: holds no *.safetensors; give a Hugging Face folder")
    try:
        return load_for_inference(folder, device, dtype)
    except MemoryError:
        raise
    except ValueError as error:
        raise ValueError(_line(folder, error)) from None
    except Exception as error:  # damaged files raise many kinds
        if short_of_memory(error):
            raise
        raise ValueError(
            f"{folder}: the weights cannot be loaded ({_line(folder, error)})"
        ) from None


def load_any(
    found: Found, device: str, prefer: str, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model of any kind, ready for `generate`. Raises ValueError, one line.

    dtype: what it computes in; None: as it is stored.
    """
    if found.kind == "artifact":
        from quant.artifact import load_quantized

        return load_quantized(found.folder, device, prefer, dtype)  # type: ignore[arg-type]
    if found.kind == "plain":
        return load_unquantized(found.folder, device, dtype)
    _check_packed(found)
    import torch

    with contextlib.redirect_stderr(io.StringIO()):  # bars that nobody can turn off
        model = load_unquantized(found.folder, device, dtype)
        with torch.inference_mode():  # the first pass may unpack the weights, and shows it
            model(torch.zeros(1, 1, dtype=torch.int64, device=device))
    return model


def _check_packed(found: Found) -> None:
    """What transformers needs to load weights that another quantizer packed."""
    from importlib.util import find_spec

    method = str(quantization_of(found.folder).get("quant_method"))
    if method == "compressed-tensors" and find_spec("compressed_tensors") is None:
        raise ValueError(
            f"{found.folder}: its weights are in the format compressed-tensors; install the "
            "package compressed-tensors to load them"
        )


def _line(folder: Path, error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
