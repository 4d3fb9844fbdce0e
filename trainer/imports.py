"""Imports that need not take torch's compiler with them.

hqq decorates methods with `torch.compile()`, which imports the compiler at once; transformers
imports hqq wherever it is installed, and a third of its own import is that. So does DeepSpeed's
Muon, which every engine imports, 1 to 2 seconds of each worker's start. Here a decorated function
is compiled when it is first called; nothing else about it changes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

MODULES = (
    "hqq.core.quantize",
    "hqq.core.peft",
    "deepspeed.runtime.zero.muon.original_muon",
)


def without_compiler() -> None:
    """From here on `MODULES` are imported without torch's compiler; a second call does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        import torch

        real = torch.compile
        torch.compile = functools.partial(_at_first_call, real)
        try:
            super().exec_module(module)
        finally:
            torch.compile = real


def _at_first_call(
    compiler: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """`torch.compile(function, **options)`, which compiles now, put off to the first call."""
    if function is None:
        return functools.partial(_at_first_call, compiler, **options)
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        nonlocal compiled
        if compiled is None:
            compiled = compiler(function, **options)
        return compiled(*args, **kwargs)

    return call
