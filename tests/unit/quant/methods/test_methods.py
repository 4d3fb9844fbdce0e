from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import quant_spec
from quant.methods import METHODS, quantize_weight

GROUPS = [8, 16, 32, 64, 96, 192, "channel"]


def nearest(weight: np.ndarray, bits: int, size: int) -> tuple[np.ndarray, ...]:
    """Round to nearest from its definition, in float64, group by group."""
    rows, columns = weight.shape
    codes = np.empty((rows, columns))
    scale, zero = (np.empty((rows, columns // size), np.float16) for _ in range(2))
    for r in range(rows):
        for g in range(columns // size):
            w = weight[r, g * size : (g + 1) * size].astype(np.float64)
            s = np.float16((w.max() - w.min()) / (2**bits - 1)) if np.ptp(w) else np.float16(1)
            z = np.float16(-w.min() / np.float64(s))
            q = np.rint(w / np.float64(s) + np.float64(z))
            codes[r, g * size : (g + 1) * size] = np.clip(q, 0, 2**bits - 1)
            scale[r, g], zero[r, g] = s, z
    return codes, scale, zero


def test_the_methods_are_those_of_the_spec():
    assert tuple(METHODS) == quant_spec.METHODS


@pytest.mark.parametrize("bits", quant_spec.BITS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_rtn_is_its_closed_form(bits, group_size):
    torch.manual_seed(bits)
    weight = torch.randn(19, 192) * torch.logspace(-4, 2, 19)[:, None]
    weight[3] = 0.5
    made = quantize_weight(weight, bits, group_size, "rtn")
    size = 192 if group_size == "channel" else group_size
    codes, scale, zero = nearest(weight.numpy(), bits, size)
    assert np.array_equal(made.codes.numpy(), codes)
    assert np.array_equal(made.scale.numpy(), scale)
    assert np.array_equal(made.zero.numpy(), zero)
    assert made.bits == bits and made.group_size == size


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    size=st.integers(1, 12).map(lambda n: 8 * n),
    bits=st.sampled_from(quant_spec.BITS),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_rtn_is_within_half_a_step(rows, groups, size, bits, scale, dtype):
    torch.manual_seed(rows)
    weight = (torch.randn(rows, groups * size) * scale).to(dtype)
    made = quantize_weight(weight, bits, size, "rtn")
    error = (made.dequantize(torch.float64) - weight).abs().unflatten(1, (-1, size))
    step = made.scale.double()[..., None]
    # At either end of a group the rounding of scale and zero point to float16 comes on top.
    ends = 2**-10 * (1 << bits) + 2**-24 / step * (1 << bits)
    assert bool((error <= step * (0.5 + ends)).all())


def test_rtn_is_what_hqq_improves_on():
    torch.manual_seed(0)
    weight = torch.randn(64, 512) * 0.02
    for bits in (2, 3, 4):
        error = {
            method: float(
                (quantize_weight(weight, bits, 64, method).dequantize() - weight).abs().mean()
            )
            for method in ("hqq", "rtn")
        }
        assert error["hqq"] < error["rtn"]


def test_int8_is_its_closed_form():
    torch.manual_seed(0)
    weight = torch.randn(50, 72) * torch.logspace(-5, 3, 50)[:, None]
    weight[7] = 0
    made = quantize_weight(weight, 8, "channel", "int8-dynamic")
    wide = weight.double().numpy()
    scale = (np.abs(wide).max(1, keepdims=True) / 127).astype(np.float16)
    scale[7] = 1
    codes = np.clip(np.rint(wide / scale.astype(np.float64)), -127, 127) + 128
    assert np.array_equal(made.codes.numpy(), codes)
    assert np.array_equal(made.scale.numpy(), scale)
    assert torch.equal(made.zero, torch.full((50, 1), 128).half())
    assert made.bits == 8 and made.group_size == 72
    assert torch.equal(made.dequantize()[7], weight[7])


def test_int8_is_odd():
    torch.manual_seed(0)
    weight = (torch.randn(20, 64)).bfloat16()
    there = quantize_weight(weight, 8, "channel", "int8-dynamic").dequantize()
    back = quantize_weight(-weight, 8, "channel", "int8-dynamic").dequantize()
    assert torch.equal(there, -back)


@pytest.mark.parametrize("method", ["rtn", "int8-dynamic"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e9])
def test_what_float16_cannot_hold_is_counted(method, wrong):
    weight = torch.randn(30, 64)
    weight[4, 3] = weight[20, 60] = wrong
    with pytest.raises(RuntimeError, match=r"^2 of 30 groups have a scale or zero point beyond"):
        quantize_weight(weight, 8, "channel", method)


@pytest.mark.parametrize("method", ["hqq", "rtn"])
def test_parts_of_a_large_matrix_fit_together(method, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(90, 128).bfloat16() * 0.02
    whole = quantize_weight(weight, 4, 32, method)
    monkeypatch.setattr("quant.methods.rtn.PART", 7 * 32)
    monkeypatch.setattr("quant.methods.slices.SLICE", 9 * 32)
    parts = quantize_weight(weight, 4, 32, method)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize(
    ("shape", "arguments", "line"),
    [
        ((4, 96), (4, 64), "group_size 64 does not divide the weight's width of 96"),
        ((4, 100), (4, "channel"), "a width of 100 is no multiple of 8"),
        ((4, 64), (7, 64), "7 bits are not offered"),
        ((4, 64), (4, 12), "group_size 12 is none"),
        ((4, 64), (4, 64, "gptq"), "'gptq' is unknown; may be hqq, rtn, int8-dynamic"),
        ((4, 64), (4, 64, "int8-dynamic"), "int8-dynamic has 8 bits and one scale per channel"),
        ((4, 4, 64), (4, 64), r"weight \[4, 4, 64\] of torch.float32 cannot be quantized"),
        ((0, 64), (4, 64), r"weight \[0, 64\]"),
    ],
)
def test_refusals(shape, arguments, line):
    with pytest.raises(ValueError, match=line) as caught:
        quantize_weight(torch.zeros(shape), *arguments)
    assert "\n" not in str(caught.value)


def test_integers_are_no_weights():
    with pytest.raises(ValueError, match="torch.int64 cannot be quantized"):
        quantize_weight(torch.ones(8, 64, dtype=torch.int64), 4, 64)


def test_only_hqq_needs_hqq():
    program = """
import sys
sys.modules["hqq"] = sys.modules["numba"] = None
import torch
from quant.methods import quantize_weight
quantize_weight(torch.randn(4, 64), 4, 32, "rtn")
quantize_weight(torch.randn(4, 64), 8, "channel", "int8-dynamic")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
