"""ggml's blocks against gguf's own reader and writer of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from quant.codes import Codes
from quant.export.gguf.blocks import encode, plain_type, type_of_codes
from quant.layers.linear import QuantLinear


def random_codes(bits: int, group: int, rows: int = 12, columns: int = 960, seed: int = 0) -> Codes:
    """Codes with fractional zeros and scales of trained weights' size."""
    torch.manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, columns // group) * 0.02 + 1e-4).half()
    zero = (torch.rand_like(scale, dtype=torch.float32) * (2**bits - 1)).half()
    return Codes(codes, scale, zero, bits)


def told_type(codes: Codes) -> tuple[Type, str]:
    return type_of_codes(QuantLinear.from_codes(codes))


@pytest.mark.parametrize("group", [32, 64, 96, 160, 960])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_codes_go_in_as_they_are(bits, group):
    codes = random_codes(bits, group)
    kind, why = told_type(codes)
    assert kind == (Type.Q5_1 if bits == 5 else Type.Q4_1)
    assert bool(why) == (bits < 4)
    made = encode(codes, kind)
    assert made.data.shape == (12, 960 // 32 * (24 if bits == 5 else 20))
    read = dequantize(made.data, kind)
    # d * q + m in float32, with m the float16 nearest to -z * s: nothing else may differ.
    offset = codes.zero.double() * codes.scale.double()
    bound = (offset.abs() * 2.0**-11 + 2.0**-25).repeat_interleave(group, 1).numpy()
    exact = codes.dequantize(torch.float64).numpy()
    assert (np.abs(read - exact) <= bound * (1 + 1e-3)).all()
    steps = codes.scale.float().repeat_interleave(group, 1).numpy()
    assert (np.abs(read - exact) < 0.01 * steps * 2**bits).all()
    lost = np.linalg.norm(read - exact) / np.linalg.norm(exact)
    assert made.error == pytest.approx(lost, rel=1e-3)
    assert made.largest == pytest.approx(np.abs(read - exact).max(), rel=1e-2)


def test_offsets_that_float16_holds_cost_nothing():
    codes = random_codes(4, 64)
    whole = Codes(codes.codes, torch.full_like(codes.scale, 2.0**-7), codes.zero.round(), 4)
    made = encode(whole, Type.Q4_1)
    assert made.error == made.largest == 0
    assert np.array_equal(dequantize(made.data, Type.Q4_1), whole.dequantize().numpy())


@pytest.mark.parametrize("group", [32, 64, 960])
def test_signed_codes_are_kept_exactly(group):
    """int8-dynamic's codes: zero 128 and one scale per row, or per group."""
    codes = random_codes(8, group)
    codes.codes[0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    signed = Codes(codes.codes, codes.scale, torch.full_like(codes.zero, 128), 8)
    assert told_type(signed) == (Type.Q8_0, "")
    made = encode(signed, Type.Q8_0)
    assert made.error == 0
    assert np.array_equal(dequantize(made.data, Type.Q8_0), signed.dequantize().numpy())


@pytest.mark.parametrize(
    "bits,group", [(8, 64), (6, 64), (8, 32), (4, 8), (4, 16), (2, 40), (5, 24)]
)
def test_what_blocks_cannot_hold_is_quantized_anew(bits, group):
    codes = random_codes(bits, group)
    kind, why = told_type(codes)
    assert kind == Type.Q8_0
    assert (f"{bits}-bit codes" if group % 32 == 0 else f"groups of {group}") in why
    made = encode(codes, kind)
    dense = codes.dequantize().numpy()
    assert np.array_equal(made.data, quantize(dense, Type.Q8_0))
    lost = np.linalg.norm(dequantize(made.data, kind) - dense) / np.linalg.norm(dense)
    assert made.error == pytest.approx(lost, rel=1e-3)
    assert 1e-4 < made.error < 0.02


def test_zeros_that_are_whole_but_too_far_are_not_wrapped():
    """A code less its zero must fit int8: 255 - 3 does not."""
    codes = random_codes(8, 64)
    far = Codes(codes.codes, codes.scale, torch.full_like(codes.zero, 3), 8)
    assert told_type(far)[1]
    read = dequantize(encode(far, Type.Q8_0).data, Type.Q8_0)
    dense = far.dequantize().numpy()
    assert np.linalg.norm(read - dense) / np.linalg.norm(dense) < 0.02


def test_rows_that_are_no_whole_blocks_stay_plain():
    codes = random_codes(4, 8, columns=72)
    kind, why = told_type(codes)
    assert kind == Type.F16 and "32" in why
    read = dequantize(encode(codes, kind).data, kind)
    np.testing.assert_allclose(read, codes.dequantize().numpy(), rtol=2**-11, atol=2**-25)


def test_an_offset_beyond_float16_makes_the_tensor_plain():
    codes = random_codes(4, 64)
    codes.scale[3, 2], codes.zero[3, 2] = 9000.0, 8.0
    kind, why = told_type(codes)
    assert kind == Type.F32 and "beyond float16" in why  # 9000 * 8 is beyond F16 itself
    assert np.array_equal(encode(codes, kind).data.view(np.float32), codes.dequantize().numpy())
    codes.scale[3, 2] = 20.0
    codes.zero[3, 2] = 4000.0
    assert told_type(codes)[0] == Type.F32
    codes.zero[3, 2] = 8.0
    assert told_type(codes) == (Type.Q4_1, "")


def test_plain_weights_get_the_nearest_type():
    assert plain_type(64, 1.0, Type.F16) == Type.F16
    assert plain_type(64, 65504.0, Type.F16) == Type.F16
    assert plain_type(64, 65520.0, Type.F16) == Type.F32
    assert plain_type(64, 1e6, Type.F16, Type.BF16) == Type.BF16
    assert plain_type(64, 1.0, Type.Q8_0) == Type.Q8_0
    assert plain_type(40, 1.0, Type.Q8_0) == Type.F16
    assert plain_type(40, 1e6, Type.F32) == Type.F32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0])
def test_plain_weights(dtype, kind):
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    made = encode(weight, kind)
    dense = weight.float().numpy()
    read = dequantize(made.data, kind)
    assert np.array_equal(made.data, quantize(dense, kind).view(np.uint8))
    assert made.error == pytest.approx(np.linalg.norm(read - dense) / np.linalg.norm(dense))
    bound = {Type.F32: 0, Type.F16: 2**-11, Type.BF16: 2**-8, Type.Q8_0: 0.02}[kind]
    assert made.error <= bound


def test_chunks_make_no_difference(monkeypatch):
    codes = random_codes(5, 96, rows=37)
    whole = encode(codes, Type.Q5_1)
    monkeypatch.setattr("quant.export.gguf.blocks.CHUNK_WEIGHTS", 2000)
    parts = encode(codes, Type.Q5_1)
    assert np.array_equal(whole.data, parts.data)
    assert parts.error == pytest.approx(whole.error, rel=1e-4)
    assert parts.largest == whole.largest
