"""Which kernel a weight gets: the fastest that holds it exactly, or the reason why none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from quant.kernels.blocks import Blocks
from quant.kernels.gemlite import Gemlite
from quant.kernels.int4 import Int4
from quant.kernels.int8_dynamic import Int8Dynamic
from quant.kernels.kernel import Kernel, Refused, StoredWeight
from quant.kernels.tinygemm import TinyGemm

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
