"""How far a forward pass is, by its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def layer_progress(module: nn.Module, say: Callable[[float], None]) -> Iterator[None]:
    """Within the block `say(share)` is called after each layer of a forward pass of `module`.

    share: of its layers that are done, up to 1. A module without a list of layers says nothing.
    """
    # The outermost one: experts are lists within a layer.
    layers = next((each for each in module.modules() if isinstance(each, nn.ModuleList)), ())

    def hook(number: int) -> Callable[..., None]:
        def after(*_: Any) -> None:
            say(number / len(layers))

        return after

    handles = [
        layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers, start=1)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
