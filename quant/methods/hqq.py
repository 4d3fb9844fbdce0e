"""hqq's codes to the last bit, on a CPU in a fraction of its time (mobiusml.github.io/hqq_blog)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from torch import Tensor

from quant.codes import Codes
from quant.methods.hqq_search import Search
from quant.methods.slices import Slices, runs

ON_DEVICE = 1 << 28  # weights at once on an accelerator: hqq has about 16 bytes of each in use


@torch.no_grad()
def quantize(weight: Tensor, bits: int, size: int) -> Codes:
    """hqq's codes of a weight `[out, in]` in groups of `size`, on its device.

    On a CPU as hqq computes them in float32, from slices in float32; where two steps' errors agree
    to some digits, the deviations of the whole weight in float32 too, which decide as hqq decides.
    On an accelerator by hqq itself, which searches in float16 there.
    A constant group has code 0 and minus its value as zero point: hqq ends with that too, except
    for 4 bits where the rest of the matrix ends the search after a few steps.
    """
    # hqq's own settings for this width; they differ between widths.
    settings = BaseQuantizeConfig(nbits=bits, group_size=size, axis=1)["weight_quant_params"]
    groups = weight.detach().reshape(-1, size)
    made = _fast if weight.device.type == "cpu" else _by_hqq
    codes, scale, zero = made(groups, settings)
    rows, columns = weight.shape
    per_row = rows, columns // size
    return Codes(codes.view(rows, columns), scale.view(per_row), zero.view(per_row), bits)


def _fast(groups: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[groups, size]`, scale and zero point float16 `[groups]`, on the CPU."""
    top = 2 ** settings["nbits"] - 1
    count = len(groups)
    low, high, inverse, zero = (torch.empty(count) for _ in range(4))
    scale16, zero16 = (torch.empty(count, dtype=torch.float16) for _ in range(2))
    codes = torch.empty(groups.shape, dtype=torch.uint8)
    slices = Slices(groups)
    for numbers, rows in slices.split(np.arange(count)):
        part = slice(int(numbers[0]), int(numbers[-1]) + 1)
        torch.amin(rows, 1, out=low[part])
        torch.amax(rows, 1, out=high[part])
    finite = True
    for part in runs(count):
        # As in Quantizer.quantize, operation for operation; its scale is the inverse one.
        spread = high[part] - low[part]
        first = top / spread
        first = torch.where(spread.abs() <= 1e-4, torch.full_like(first, 1.0), first)
        inverse[part] = first.clamp(max=2e4)
        start = -low[part] * inverse[part]
        zero[part] = torch.round(start) if settings["round_zero"] else start
        finite &= bool(spread.isfinite().all())
    if finite:  # else it is refused in the end: codes mean nothing
        search = Search(slices, inverse.numpy(), zero.numpy(), top)
        search.run()
        for part in runs(count):
            zero[part] = torch.where(low[part] == high[part], -low[part], zero[part])
        search.encode(codes)
    for part in runs(count):
        scale16[part] = 1.0 / inverse[part]
        zero16[part] = zero[part]
    return codes, scale16, zero16


def _by_hqq(groups: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The same by hqq itself, on the device of the groups.

    Of a matrix of more than `ON_DEVICE` weights each part ends its search on its own.
    """
    parts = []
    for part in groups.split(max(ON_DEVICE // groups.shape[1], 1)):
        codes, meta = Quantizer.quantize(
            part.float(), **settings, bitpack=False, device=groups.device
        )
        low, high = part.amin(1).float(), part.amax(1).float()
        constant = low == high
        zero = torch.where(constant, -low, meta["zero"].flatten())
        codes = codes.to(torch.uint8).masked_fill_(constant[:, None], 0)
        parts.append((codes, meta["scale"].flatten().half(), zero.half()))
    codes, scale, zero = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return codes, scale, zero
