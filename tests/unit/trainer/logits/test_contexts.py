"""How the kernels of the codec are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import pytest

from trainer.logits.contexts import jit


def kernel(folder: str) -> Callable[..., Any]:
    """A function whose source would be in a folder."""
    found: dict[str, Any] = {}
    exec(compile("def double(x): return 2 * x", f"{folder}/kernel.py", "exec"), found)
    return found["double"]  # type: ignore[no-any-return]


def test_kernels_are_compiled_where_they_cannot_be_kept(monkeypatch) -> None:
    """Neither beside the sources nor in the user's cache: no process can write into /proc."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "/proc/none")
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(kernel("/proc/none"))
    assert jit(kernel("/proc/none"))(21) == 42


def test_other_errors_of_the_compiler_are_told(monkeypatch) -> None:
    def fail(**_: Any) -> Any:
        raise RuntimeError("out of registers")

    monkeypatch.setattr("trainer.logits.contexts.njit", fail)
    with pytest.raises(RuntimeError, match="out of registers"):
        jit(kernel("/proc/none"))
