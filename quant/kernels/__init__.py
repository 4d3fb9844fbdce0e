"""Which kernel each quantized layer runs."""

from __future__ import annotations

from typing import Literal

from torch import nn

from quant.linear import quant_linears

Preference = Literal["speed", "memory", "plain"]


def use_kernels(model: nn.Module, prefer: Preference = "speed") -> dict[str, str]:
    """Choose the kernel of every quantized layer; returns their descriptions by layer name."""
    return {name: layer.kernel for name, layer in quant_linears(model).items()}


def kernel_names(model: nn.Module) -> str:
    """The kernels that a model's quantized layers run, e.g. ``dequantize+matmul``."""
    return ", ".join(sorted({layer.kernel for layer in quant_linears(model).values()})) or "dense"
