"""Which kernel each quantized layer runs: the fastest exact one for its layout and device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from quant.kernels.blocks import Blocks
from quant.kernels.cuda import Gemlite, TinyGemm
from quant.kernels.int4 import Int4
from quant.kernels.int8_dynamic import Int8Dynamic
from quant.kernels.kernel import Kernel, Refused, StoredWeight

Preference = Literal["speed", "memory", "plain"]
PREFERENCES = ("speed", "memory", "plain")


def choose(weight: StoredWeight, prefer: Preference) -> tuple[Kernel | None, str]:
    """The kernel of a weight on its device, or None and why (empty when plain was asked for)."""
    if prefer == "plain":
        return None, ""
    device = weight.codes.device.type
    if device not in ("cpu", "cuda"):
        return None, f"no kernel for device {device}"
    if prefer == "memory":
        if weight.shared:
            return None, "the embedding holds these codes, a layout would double them"
        if weight.bits not in (4, 8):
            return None, f"{weight.bits}-bit codes would take more memory in a kernel's layout"
    reason = ""
    for make in candidates(weight, device):
        try:
            kernel = make(weight)
            if reason and device == "cpu":  # there is a faster one, which cannot be had here
                kernel.name = f"{kernel.name} ({reason})"
            return kernel, ""
        except Refused as refused:
            reason = reason or str(refused)
    return None, reason


def candidates(weight: StoredWeight, device: str) -> list[Callable[[StoredWeight], Kernel]]:
    """The kernels to try, the fastest first; the first one's reason is the one that is told."""
    if weight.activations == "int8":
        return [Int8Dynamic]
    if device == "cpu":
        return [Blocks, Int4]
    return [TinyGemm, Gemlite] if weight.bits in (3, 4) else [Gemlite, TinyGemm]


__all__ = ["Preference", "kernel_names", "use_kernels"]


def use_kernels(model: nn.Module, prefer: Preference = "speed") -> dict[str, str]:
    """Choose the kernel of every quantized linear layer; returns what each runs, by layer name.

    "speed": the fastest one, where codes of 1 to 3 bits take 4 bits of memory and those of 5 and 6
    take 8. "memory": only layouts that hold the codes in as many bytes as they are stored in. The
    kernel's own copy of scales and zero points comes on top with both: 32 bits per group, or 64
    where the int4 kernel of a CPU has two planes (codes of 5 to 8 bits), and 4 more, 16 on CUDA,
    where one plane's offsets need them (`quant.kernels.blocks`). "plain": dequantize +
    matmul, as stored. Stored codes are let go while a kernel holds them, and come back exactly.
    Where no kernel fits, the description says why. Raises ValueError for another preference.
    """
    if prefer not in PREFERENCES:
        raise ValueError(f"prefer {prefer!r} is unknown; may be {', '.join(PREFERENCES)}")
    chosen = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "use_kernel"):
            layer.use_kernel(prefer)
            chosen[name] = str(layer.kernel)
    return chosen


def kernel_names(model: nn.Module) -> str:
    """The kernels that a model's quantized layers run, e.g. ``int4 x int8 (AVX2)``."""
    names = {str(m.kernel) for m in model.modules() if hasattr(m, "use_kernel")}
    found = {"plain" if name.startswith("plain:") else name for name in names}
    return "; ".join(sorted(found)) or "dense"
