"""Models and tokenizers from their folders, with one line for what does not load."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.models.find import Found
from quant.tokenizer_files import has_tokenizer

if TYPE_CHECKING:
    import torch


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


def load_tokenizer(found: Found) -> Any:
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


def load_unquantized(folder: Path, device: str, dtype: torch.dtype | None = None) -> Any:
    """A plain model on the CPU or a GPU. dtype: None: that it is stored in.

    Raises ValueError, one line, if its weights are not those of its config.
    """
    from trainer.models.load import load_model

    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: holds no *.safetensors; give a Hugging Face folder")
    try:
        model = load_model(folder, dtype or "auto")  # type: ignore[arg-type]
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
    return model.requires_grad_(False).eval().to(device)


def load_any(found: Found, device: str, prefer: str, dtype: torch.dtype | None = None) -> Any:
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

    from jobs.models.find import quantization_of

    method = str(quantization_of(found.folder).get("quant_method"))
    if method == "compressed-tensors" and find_spec("compressed_tensors") is None:
        raise ValueError(
            f"{found.folder}: its weights are in the format compressed-tensors; install the "
            "package compressed-tensors to load them"
        )


def _line(folder: Path, error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
