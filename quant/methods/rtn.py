"""Round to nearest: codes spread evenly between each group's least and greatest weight."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.codes import Codes

PART = 1 << 20  # weights at a time: their float64 temporaries stay small
LEAST = 2.0**-24  # the least scale float16 has; below, it would be 0


@torch.no_grad()
def quantize(weight: Tensor, bits: int, size: int) -> Codes:
    """Codes of a weight `[out, in]` in groups of `size`: the baseline to beat, on its device.

    `scale = (max - min) / (2^bits - 1)`, `zero = -min / scale`, both rounded to float16 (scale
    first); a code is the one nearest to its weight given these, `round(w / scale + zero)`, in
    float64. A constant group has scale 1 and code 0.
    """
    rows, columns = weight.shape
    groups = weight.detach().reshape(-1, size)
    top = 2**bits - 1
    codes, scales, zeros = [], [], []
    for part in groups.split(max(PART // size, 1)):
        wide = part.double()
        low, high = wide.aminmax(dim=1, keepdim=True)
        spread = high - low
        scale = torch.where(spread == 0, 1.0, (spread / top).clamp(min=LEAST)).half()
        zero = (-low / scale.double()).half()
        codes.append((wide / scale.double() + zero.double()).round().clamp(0, top).byte())
        scales.append(scale)
        zeros.append(zero)
    per_row = rows, columns // size
    return Codes(
        torch.cat(codes).view(rows, columns),
        torch.cat(scales).view(per_row),
        torch.cat(zeros).view(per_row),
        bits,
    )
