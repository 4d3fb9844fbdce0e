"""The methods that turn a weight into codes, behind one seam: `quantize_weight`."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from torch import Tensor

from quant.codes import Codes

ROWS = 128  # rows quantized at a time: bounds hqq's whole-matrix temporaries


@torch.no_grad()
def quantize_weight(weight: Tensor, bits: int, group_size: int | str, method: str = "hqq") -> Codes:
    """hqq's codes of a weight `[out, in]`, on the weight's device.

    Returns codes uint8 `[out, in]`, scale and zero float16 `[out, in / group_size]`, such that
    `weight ~ (codes - zero) * scale`. Raises RuntimeError when a zero point exceeds float16.
    """
    assert method == "hqq" and isinstance(group_size, int)
    # hqq's own defaults for this width; they differ between widths.
    settings = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)["weight_quant_params"]
    rows, columns = weight.shape
    groups = columns // group_size
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, groups, dtype=torch.float16, device=weight.device)
    zero = torch.empty_like(scale)
    for first in range(0, rows, ROWS):
        part = slice(first, first + ROWS)
        quantized, meta = Quantizer.quantize(
            weight[part].float(),
            **settings,
            bitpack=False,
            device=weight.device,
        )
        codes[part] = quantized.reshape(-1, columns).to(torch.uint8)
        scale[part] = meta["scale"].reshape(-1, groups).to(torch.float16)
        zero[part] = meta["zero"].reshape(-1, groups).to(torch.float16)
    bad = int((~(scale.isfinite() & zero.isfinite())).sum())
    if bad:
        raise RuntimeError(
            f"{bad} of {scale.numel()} groups have a scale or zero point beyond float16: "
            "the weights are not finite, or huge beside their spread"
        )
    return Codes(codes, scale, zero, bits)
