"""Random quantized layers for the tests of kernels, and their weight in float64."""

from __future__ import annotations

import numpy as np
import torch

from quant.codes import Codes
from quant.kernels.kernel import StoredWeight
from quant.linear import QuantLinear
from quant.methods import quantize_weight
from quant.pack import pack


def random_codes(
    bits: int, group: int, rows: int = 96, columns: int = 256, whole: bool = False, seed: int = 0
) -> Codes:
    """Codes with zero points as hqq's: of any fraction, some beyond the codes' range; or whole."""
    generator = torch.Generator().manual_seed(seed + 100 * bits + group)
    top = (1 << bits) - 1
    groups = columns // group
    codes = torch.randint(top + 1, (rows, columns), generator=generator).to(torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) + 0.2).half() / top
    zero = (torch.randn(rows, groups, generator=generator) * 0.2 + 0.5) * top
    if whole:
        zero = torch.full_like(zero, 128)
    return Codes(codes, scale, zero.half(), bits)


def heavy_tailed(bits: int, group: int, rows: int = 96, columns: int = 512) -> StoredWeight:
    """Weights of which few are large: they stretch the ranges of their groups (Student's t, 3)."""
    torch.manual_seed(bits + group)
    weight = torch.distributions.StudentT(3.0).sample((rows, columns)) * 0.02
    codes = quantize_weight(weight, bits, group)
    return StoredWeight(pack(codes.codes, bits), codes.scale, codes.zero, bits, columns)


def weight_in_float64(codes: Codes) -> np.ndarray:
    q, s, z = (part.double().numpy() for part in (codes.codes, codes.scale, codes.zero))
    group = codes.group_size
    return (q - z.repeat(group, axis=1)) * s.repeat(group, axis=1)


def random_input(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def relative_error(layer: QuantLinear, x: torch.Tensor, weight: np.ndarray) -> float:
    """Of the layer's outputs against the float64 product, in the root mean square."""
    expected = x.double().numpy() @ weight.T
    with torch.no_grad():
        found = layer(x)
    assert found.dtype == x.dtype and found.shape == (*x.shape[:-1], len(weight))
    difference = found.double().numpy() - expected
    return float(np.sqrt((difference**2).mean() / (expected**2).mean()))
