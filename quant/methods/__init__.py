"""The methods that turn a weight into codes, behind one seam: `quantize_weight`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from quant.codes import Codes
from quant.methods.slices import runs
from quant.quant_spec import CHANNEL, GroupSize, QuantSpec

# Module and function of each method.
METHODS = {
    "hqq": ("hqq", "quantize"),
    "rtn": ("rtn", "quantize"),
    "int8-dynamic": ("rtn", "quantize_int8"),
}


def load_method(method: str) -> Callable[[Tensor, int, int], Codes]:
    """The function of a method, imported at its first use: hqq alone takes seconds."""
    module, function = METHODS[method]
    found: Callable[[Tensor, int, int], Codes] = getattr(
        import_module(f"quant.methods.{module}"), function
    )
    return found


def quantize_weight(weight: Tensor, bits: int, group_size: GroupSize, method: str = "hqq") -> Codes:
    """Codes of a floating-point weight `[out, in]`, on the weight's device.

    bits, group_size and method are as in `QuantSpec`; "channel" is one group per row. Returns codes
    uint8 `[out, in]`, scale and zero float16 `[out, groups]`: `w ~ (codes - zero) * scale`.
    Raises ValueError (one line) for a weight or a combination that is not offered, RuntimeError
    when a scale or zero point exceeds float16.
    """
    QuantSpec(bits, group_size, method)
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(
            f"weight {list(weight.shape)} of {weight.dtype} cannot be quantized; may be a matrix "
            "[out, in] of floating-point numbers, not empty"
        )
    columns = weight.shape[1]
    size = columns if group_size == CHANNEL else int(group_size)
    if columns % size:
        raise ValueError(
            f"group_size {size} does not divide the weight's width of {columns}: groups never "
            "span rows"
        )
    if size % 8:
        raise ValueError(f"a width of {columns} is no multiple of 8: it cannot be quantized")
    made: Codes = load_method(method)(weight, bits, size)
    scale, zero = made.scale.flatten(), made.zero.flatten()
    bad = sum(
        int((~(scale[part].isfinite() & zero[part].isfinite())).sum())
        for part in runs(scale.numel())
    )
    if bad:
        raise RuntimeError(
            f"{bad} of {scale.numel()} groups have a scale or zero point beyond float16: "
            "the weights are not finite, or huge beside their spread"
        )
    return made
