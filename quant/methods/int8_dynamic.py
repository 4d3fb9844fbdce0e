"""Symmetric int8 weights, one scale per row: the weight side of dynamic quantization.

The activations are quantized to int8 per token while the model runs; nothing of them is here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.codes import Codes
from quant.methods.rtn import LEAST, PART

LEVELS = 127  # to either side of 0: -128 is left out, so that the negative of a code is one
ZERO = 128  # int8 codes are stored in uint8, this much higher


@torch.no_grad()
def quantize(weight: Tensor, bits: int = 8, size: int | None = None) -> Codes:
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
