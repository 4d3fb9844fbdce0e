"""Kernels that are compiled with the installation."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from numba.core.dispatcher import Dispatcher

from jobs.build_kernels import build
from quant.methods import hqq_search
from trainer.logits import contexts, decoder, encoder, rans


def kept(module: ModuleType) -> dict[str, Dispatcher]:
    """A module's kernels that are kept on disk, by the start of the name of their files there."""
    stem = module.__name__.rpartition(".")[2]
    return {
        f"{stem}.{name}": function
        for name, function in vars(module).items()
        if isinstance(function, Dispatcher)
        and function.py_func.__module__ == module.__name__
        and function.stats.cache_path is not None
    }


def test_every_kernel_that_is_kept_on_disk_is_built() -> None:
    build()
    found = {
        key: each
        for m in (hqq_search, contexts, rans, decoder, encoder)
        for key, each in kept(m).items()
    }
    # One that others call is not compiled by itself where those are read from the disk.
    missing = [
        key
        for key, function in found.items()
        if not function.signatures and not any(Path(function.stats.cache_path).glob(f"{key}*.nbi"))
    ]
    assert len(found) > 15 and not missing
