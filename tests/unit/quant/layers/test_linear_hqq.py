"""The layers against the `hqq` package's own: codes, weights and outputs."""

from __future__ import annotations

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

from quant.codes import Codes
from quant.kernels import use_kernels
from quant.layers.linear import QuantLinear

COLUMNS = 256
GROUPS = (8, 16, 32, 64, 128, COLUMNS)  # the last: one per channel


@pytest.fixture(scope="module")
def theirs():
    """hqq's layer by (bits, group)."""
    made = {}
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, COLUMNS, generator=generator) * 0.05
    for bits in (8, 6, 5, 4, 3, 2, 1):
        for group in GROUPS:
            linear = torch.nn.Linear(COLUMNS, 48, bias=False)
            linear.weight.data = weight.clone()
            config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
            made[bits, group] = HQQLinear(
                linear, config, compute_dtype=torch.float16, device="cpu", initialize=True
            )
    return made


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1])
def test_agrees_with_hqqs_dequantize_to_rounding(theirs, bits, group):
    hqq = theirs[bits, group]
    groups = 48 * COLUMNS // group
    # hqq keeps ten 3-bit codes in a word: there may be more rows than it was given.
    codes = hqq.unpack().view(-1, group)[:groups].reshape(48, COLUMNS).to(torch.uint8)
    scale, zero = (hqq.meta[name].view(48, -1) for name in ("scale", "zero"))
    assert scale.dtype == zero.dtype == torch.float16
    layer = QuantLinear.from_codes(Codes(codes, scale, zero, bits))
    weight = hqq.dequantize().view(48, COLUMNS).float()
    # hqq rounds q - z and its product with s to float16 (2^-11), ours is rounded once.
    largest = (codes.float() - zero.float().repeat_interleave(group, 1)).abs()
    bound = 2**-10 * largest * scale.float().repeat_interleave(group, 1) + 2**-24
    assert bool(((layer.dequantize() - weight).abs() <= bound).all())
    assert torch.equal(layer.dequantize(torch.bfloat16), layer.dequantize().bfloat16())
    x = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = x.double() @ weight.double().t()
    described = use_kernels(layer)[""]
    assert described.startswith("plain: groups of") == (group < 32)
    error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < 0.008, float(error)  # of which int8 inputs are 0.005, bfloat16 outputs 0.0017
