"""Kernels that are compiled with the installation."""

from __future__ import annotations

from numba.core.caching import NullCache
from numba.core.dispatcher import Dispatcher

from jobs.build_kernels import build
from quant.methods import loops
from trainer.logits import model, rans, rows, symbols


def test_every_kernel_that_is_kept_on_disk_is_called() -> None:
    build()
    kept = {
        f"{module.__name__}.{name}": function
        for module in (loops, model, rans, rows, symbols)
        for name, function in vars(module).items()
        if isinstance(function, Dispatcher) and not isinstance(function._cache, NullCache)
    }
    missing = [name for name, function in kept.items() if not function.signatures]
    assert len(kept) > 15 and not missing
