"""Round to nearest: codes spread evenly between each group's least and greatest weight.

`quantize_int8` is symmetric with one scale per row: the weight side of dynamic quantization. The
activations are quantized to int8 per token while the model runs.
"""

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


LEVELS = 127  # to either side of 0: -128 is left out, so that the negative of a code is one
ZERO = 128  # int8 codes are stored in uint8, this much higher


@torch.no_grad()
def quantize_int8(weight: Tensor, bits: int = 8, size: int | None = None) -> Codes:
    """Codes of a weight `[out, in]`, on its device: `w ~ (code - 128) * scale`.

    `scale = max |w| / 127` per row in float16, 1 for a row of zeros; a code is the nearest one,
    from 1 to 255. bits and size are 8 and the whole row, whatever is said.
    """
    codes, scales = [], []
    for part in weight.detach().split(max(PART // weight.shape[1], 1)):
        wide = part.double()
        most = wide.abs().amax(1, keepdim=True)
        scale = torch.where(most == 0, 1.0, (most / LEVELS).clamp(min=LEAST)).half()
        steps = (wide / scale.double()).round().clamp(-LEVELS, LEVELS)
        codes.append((steps + ZERO).byte())
        scales.append(scale)
    scale = torch.cat(scales)
    return Codes(torch.cat(codes), scale, torch.full_like(scale, ZERO), 8)
