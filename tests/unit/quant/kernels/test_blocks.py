"""Codes x int8 in C++, against float64; with each instruction set that this processor has."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.codes import Codes, pack
from quant.kernels import kernel_names, native, use_kernels
from quant.kernels.blocks import BLOCK, Blocks
from quant.kernels.kernel import Refused, StoredWeight
from quant.layers.linear import QuantLinear
from tests.fixtures.kernel_layers import heavy_tailed, random_codes, weight_in_float64

BITS = (1, 2, 3, 4, 5, 6, 7, 8)


def kernels(codes):
    """The kernel on every instruction set there is."""
    stored = StoredWeight(
        pack(codes.codes, codes.bits), codes.scale, codes.zero, codes.bits, codes.codes.shape[1]
    )
    for vnni in {False, native.use_vnni()}:
        kernel = Blocks(stored)
        kernel.vnni, kernel.few = vnni, None
        yield kernel


def rounded(x):
    """float64 `[rows, columns]`: what int8 makes of x in blocks of 32 columns."""
    blocks = x.double().numpy().reshape(len(x), -1, BLOCK)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.round(blocks / np.where(step == 0, 1, step)) * step).reshape(x.shape)


def inputs(rows, columns, mean=0.0, outliers=False, dtype=torch.float32):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) + mean
    if outliers:  # a column that is 30 times as large, as language models have them
        x[:, columns // 3] *= 30
    return x.to(dtype)


@pytest.mark.parametrize("group", [32, 64, 96, 256])
@pytest.mark.parametrize("bits", BITS)
def test_all_but_the_rounding_of_activations_is_exact(bits, group):
    codes = random_codes(bits, group, rows=50, columns=768)
    weight = weight_in_float64(codes)
    for kernel in kernels(codes):
        for rows in range(1, 17):
            x = inputs(rows, 768, mean=0.5, outliers=rows % 2 == 0)
            expected = rounded(x) @ weight.T
            error = np.linalg.norm(kernel(x).double().numpy() - expected)
            assert error < 1e-3 * np.linalg.norm(expected), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("mean", "outliers"), [(0.0, False), (1.0, False), (0.0, True)])
@pytest.mark.parametrize("group", [32, 64, 128, 512])
@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2])
def test_the_error_that_the_docs_state(bits, group, mean, outliers, dtype):
    weight = heavy_tailed(bits, group)
    dense = weight.unpacked().dequantize(torch.float64).numpy()
    for kernel in kernels(weight.unpacked()):
        for rows in (1, 4, 16):
            x = inputs(rows, 512, mean, outliers, dtype)
            expected = x.double().numpy() @ dense.T
            error = np.linalg.norm(kernel(x).double().numpy() - expected)
            assert error < (0.02 if outliers else 0.01) * np.linalg.norm(expected), rows


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from([32, 64, 96, 128, 256]),
    groups=st.integers(1, 3),
    rows=st.integers(1, 70),
    tokens=st.integers(0, 9),
)
def test_any_shape_gives_its_codes_back_and_its_own_dense_weight(bits, group, groups, rows, tokens):
    codes = random_codes(bits, group, rows=rows, columns=group * groups)
    for kernel in kernels(codes):
        assert torch.equal(kernel.unpacked().codes, codes.codes)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert torch.equal(kernel.dequantize(dtype), codes.dequantize(dtype))
        x = inputs(tokens, group * groups)
        expected = rounded(x) @ weight_in_float64(codes).T if tokens else np.zeros((0, rows))
        bound = (
            1e-3
            * np.abs(x.numpy()).sum(1, keepdims=True)
            * float(kernel.dequantize(torch.float32).abs().max())
        )
        assert kernel(x).shape == (tokens, rows)
        assert (np.abs(kernel(x).numpy() - expected) <= bound).all()


def test_many_rows_are_multiplied_by_the_very_weight():
    codes = random_codes(4, 64, rows=80)
    for kernel in kernels(codes):
        kernel.few = 8
        assert torch.equal(kernel(torch.eye(256).bfloat16()), codes.dequantize(torch.bfloat16).t())


def test_extremes_of_activations():
    codes = random_codes(4, 64)
    for kernel in kernels(codes):
        x = torch.zeros(6, 256)
        x[1, 70], x[2, 70], x[3] = torch.nan, torch.inf, 1e-42
        x[4], x[5] = 3e38, inputs(1, 256)
        y = kernel(x)
        assert not y[0].any() and y[1].isnan().all() and not y[2].isfinite().any()
        assert (y[3].abs() < 1e-38).all() and torch.equal(y[5:], kernel(x[5:]))


def test_shares_work_over_threads_without_a_difference():
    kernel = Blocks(heavy_tailed(4, 64, rows=2048))
    x = inputs(3, 512)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(kernel(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_what_it_cannot_hold_is_refused():
    for columns, group in ((256, 8), (240, 48)):
        codes = random_codes(4, group, columns=columns)
        with pytest.raises(Refused, match=f"groups of {group} "):
            next(kernels(codes))
    codes = random_codes(4, 64)
    codes.zero[3, 1] = torch.nan
    with pytest.raises(Refused, match="not finite"):
        next(kernels(codes))


def test_held_back_to_avx2_it_uses_no_more(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert not native.use_vnni()
    layer = QuantLinear.from_codes(random_codes(4, 64))
    assert use_kernels(layer)[""] == "int4 x int8 (AVX2)"


@pytest.fixture
def no_op(monkeypatch, tmp_path):
    """A machine on which the op is not built, and has no compiler."""
    native.unavailable.cache_clear()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    yield
    native.unavailable.cache_clear()


def test_without_a_compiler_torchs_kernel_runs_and_says_why(no_op):
    layer = QuantLinear.from_codes(random_codes(4, 64))
    use_kernels(layer)
    assert kernel_names(layer).startswith("int4 to ")
    assert "no-such-compiler not found" in kernel_names(layer)
    assert layer(torch.ones(1, 256)).shape == (1, 96)


def test_a_compiler_that_fails_is_a_reason_of_one_line(no_op, monkeypatch, tmp_path):
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho 'codes.cpp:1: fatal error: no headers' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    reason = native.unavailable()
    assert "no headers" in reason and "\n" not in reason
    assert not [name for name in os.listdir(tmp_path / "stillhouse_cpu")]


def test_the_dense_weight_of_a_layer_is_the_plain_paths():
    codes = Codes(*(getattr(random_codes(4, 32), n) for n in ("codes", "scale", "zero", "bits")))
    layer = QuantLinear.from_codes(codes)
    expected = layer.dequantize(torch.bfloat16)
    use_kernels(layer)
    assert torch.equal(layer.dequantize(torch.bfloat16), expected)
