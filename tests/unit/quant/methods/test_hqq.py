"""Every code, scale and zero point is compared with hqq's own quantizer on the whole matrix."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hqq.core.optimize import optimize_weights_proximal_legacy
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.codes import Codes
from quant.methods import hqq, hqq_search, quantize_weight
from quant.methods.slices import SLICE, Slices, runs
from quant.quant_spec import BITS


def by_hqq(weight: torch.Tensor, bits: int, group_size: int | str) -> Codes:
    size = weight.shape[1] if group_size == "channel" else int(group_size)
    config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=1)["weight_quant_params"]
    codes, meta = Quantizer.quantize(weight.float(), **config, bitpack=False, device="cpu")
    per_row = (len(weight), -1)
    return Codes(
        codes.reshape(weight.shape).to(torch.uint8),
        meta["scale"].reshape(per_row).half(),
        meta["zero"].reshape(per_row).half(),
        bits,
    )


def assert_equal(ours: Codes, theirs: Codes) -> None:
    for name in ("codes", "scale", "zero"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == b.dtype and a.shape == b.shape
        wrong = int((a != b).sum())
        assert not wrong, f"{wrong} of {a.numel()} {name} are not hqq's"


def random_weight(kind: str, rows: int, columns: int) -> torch.Tensor:
    if kind == "outliers":  # as in trained models: few input channels with large weights
        return torch.randn(rows, columns) * 0.02 * (1 + 30 * (torch.rand(columns) < 0.02))
    if kind == "heavy":
        return torch.distributions.StudentT(2.0).sample((rows, columns)) * 0.05
    if kind == "rows":  # from tiny rows, where hqq's scale is at its bound, to huge ones
        return torch.randn(rows, columns) * torch.logspace(-4, 2, rows)[:, None]
    if kind == "lattice":  # many ties in rounding
        return torch.randint(-8, 8, (rows, columns)) / 16
    return torch.randn(rows, columns) * (1.0 if kind == "wide" else 0.02)


KINDS = ["normal", "wide", "outliers", "heavy", "rows", "lattice"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 16, 24, 32, 64, 96, 128, 192, 256, "channel"])
def test_hqqs_own_to_the_last_bit(bits, group_size):
    torch.manual_seed(bits)
    columns = 768 if group_size != 256 else 1024
    # Several slices, the last of them not full; large errors, which take hqq's own step, in some.
    weight = torch.cat([random_weight(kind, 23, columns) for kind in KINDS])
    assert weight.numel() > 3 * SLICE and weight.numel() % (SLICE - 1)
    assert_equal(quantize_weight(weight, bits, group_size), by_hqq(weight, bits, group_size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 37])
def test_few_rows_of_one_kind(kind, rows):
    torch.manual_seed(rows)
    for bits in BITS:
        for columns, group_size in ((40, 8), (72, 24), (320, 64), (1032, "channel")):
            weight = random_weight(kind, rows, columns)
            made = quantize_weight(weight, bits, group_size)
            assert_equal(made, by_hqq(weight, bits, group_size))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 200),
    groups=st.integers(1, 9),
    size=st.integers(1, 20).map(lambda n: 8 * n),
    bits=st.sampled_from(BITS),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_type(rows, groups, size, bits, kind, dtype, seed):
    torch.manual_seed(seed)
    weight = random_weight(kind, rows, groups * size).to(dtype)
    assert_equal(quantize_weight(weight, bits, size), by_hqq(weight, bits, size))


def test_the_search_ends_for_the_whole_matrix_not_for_its_parts():
    """Rows of which the error rises at once end the search of the others, and only together."""
    torch.manual_seed(0)
    calm = torch.randn(128, 512) * 0.02
    rising = torch.where(torch.rand(128, 512) < 0.1, 5.0, 0.01) * torch.randn(128, 512)
    weight = torch.cat([calm, rising])
    whole = by_hqq(weight, 4, 64)
    alone = by_hqq(calm, 4, 64)
    assert int((whole.codes[:128] != alone.codes).sum()) > 500
    assert_equal(quantize_weight(weight, 4, 64), whole)
    assert_equal(quantize_weight(calm, 4, 64), alone)


def test_nearly_equal_errors_are_compared_as_hqq_compares_them(monkeypatch):
    """Where the search ends by a hair, a sum in another order can end it elsewhere."""
    means = []
    mean = hqq_search._ExactError.mean
    monkeypatch.setattr(
        hqq_search._ExactError, "mean", lambda e: means.append(mean(e)) or means[-1]
    )

    def differ() -> int:
        count = 0
        for seed in (75, 201):
            torch.manual_seed(seed)
            weight = (torch.randn(64, 512) * 0.02).bfloat16()
            ours, theirs = quantize_weight(weight, 2, 64), by_hqq(weight, 2, 64)
            count += not torch.equal(ours.codes, theirs.codes)
        return count

    assert differ() == 0
    assert len(means) >= 4
    if torch.backends.cpu.get_cpu_capability() == "AVX512":  # the order of torch's sum
        monkeypatch.setattr(hqq_search, "TIE", 0.0)
        assert differ() > 0


@pytest.mark.parametrize("size", [8, 16, 24, 40, 64])
def test_large_errors_are_shrunk_as_in_vectors_of_the_whole_matrix(size):
    """torch's pow of an element differs, in the last bit, behind the last whole vector."""
    for seed in range(40):
        torch.manual_seed(seed)
        groups = torch.randn(1 + seed, size) * 0.5
        low, high = groups.aminmax(dim=1, keepdim=True)
        scale = 3 / (high - low)
        start = -low * scale
        _, _, zero = optimize_weights_proximal_legacy(groups, scale, start.clone(), [0, 3], axis=1)
        ours = start.flatten().numpy()
        hqq_search.Search(Slices(groups), scale.flatten().numpy(), ours, 3).run()
        assert torch.equal(torch.from_numpy(ours), zero.flatten())


def test_threads_neither_matter_nor_change():
    torch.manual_seed(0)
    weight = torch.cat([random_weight(kind, 40, 1024) for kind in KINDS])
    one = quantize_weight(weight, 3, 64)
    torch.set_num_threads(3)
    three = quantize_weight(weight, 3, 64)
    assert torch.get_num_threads() == 3
    # 3 threads of torch end the mean, and pow, in other places: see the module.
    assert int((one.codes != three.codes).sum()) <= weight.numel() * 1e-4
    assert torch.equal(one.scale, three.scale)


@pytest.mark.parametrize("bits", BITS)
def test_constant_groups_stay_what_they_are(bits):
    torch.manual_seed(0)
    weight = torch.randn(6, 48) * 0.02
    weight[0] = 0
    weight[1] = 0.5
    weight[2, :16] = -2.0
    weight[3, 16:32] = 1.25
    weight[4] = 1e-3
    made = quantize_weight(weight, bits, 16)
    constant = weight.view(-1, 16).amin(1) == weight.view(-1, 16).amax(1)
    assert int(constant.sum()) == 11
    groups = made.dequantize().view(-1, 16)[constant]
    torch.testing.assert_close(groups, weight.view(-1, 16)[constant], rtol=2**-11, atol=1e-7)
    assert_equal(made, by_hqq(weight, bits, 16))


def test_a_constant_group_does_not_suffer_from_an_early_end():
    torch.manual_seed(0)
    rising = torch.where(torch.rand(128, 512) < 0.1, 5.0, 0.01) * torch.randn(128, 512)
    group = rising[5, :64]
    group[:] = 0.5
    assert float((by_hqq(rising, 4, 64).dequantize()[5, :64] - 0.5).abs().max()) > 0.2
    assert torch.equal(quantize_weight(rising, 4, 64).dequantize()[5, :64], group)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_weights_that_are_not_finite_are_counted(wrong):
    torch.manual_seed(0)
    weight = torch.randn(40, 64)
    weight[3, 5] = weight[9, 40] = weight[9, 41] = wrong
    weight[9, 42] = -wrong
    with pytest.raises(RuntimeError, match=r"^2 of 80 groups have a scale or zero point beyond"):
        quantize_weight(weight, 4, 32)


def test_a_zero_point_beyond_float16_is_counted():
    weight = torch.randn(4, 64)
    weight[2] = 50.0 + torch.rand(64) * 1e-3
    weight[3] = 1e5  # constant
    with pytest.raises(RuntimeError, match=r"^4 of 8 groups.*huge beside their spread$"):
        quantize_weight(weight, 8, 32)


def test_neither_gradients_nor_order_in_memory_matter():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(256, 96))
    made = quantize_weight(weight.t(), 4, 32)
    assert_equal(made, by_hqq(weight.detach().t().contiguous(), 4, 32))
    assert not any(t.requires_grad for t in (made.codes, made.scale, made.zero))


def test_what_runs_on_an_accelerator_is_the_same_on_a_cpu(monkeypatch):
    torch.manual_seed(0)
    weight = random_weight("outliers", 40, 192)
    weight[7] = 0.5
    config: dict[str, Any] = BaseQuantizeConfig(nbits=3, group_size=64, axis=1)
    groups = weight.view(-1, 64)
    theirs = by_hqq(weight, 3, 64)
    for most in (1 << 28, 30 * 64):
        monkeypatch.setattr(hqq, "ON_DEVICE", most)
        codes, scale, zero = hqq._by_hqq(groups, config["weight_quant_params"])
        assert torch.equal(scale.view(40, 3), theirs.scale)
        if most > weight.numel():
            assert torch.equal(codes.view(40, 192), theirs.codes)
            assert torch.equal(zero.view(40, 3), theirs.zero)
        else:  # parts end on their own
            assert float((codes.view(40, 192) != theirs.codes).float().mean()) < 0.01


def test_slices_cover_everything_once():
    assert runs(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert runs(0) == []


def test_no_whole_matrix_in_float32():
    """16 MiB of bfloat16 weights: their codes take 8, one whole matrix in float32 would take 32."""
    program = """
import resource, torch
from quant.methods import hqq_search, quantize_weight
torch.set_num_threads(1)
hqq_search._OPTIONS = {**hqq_search._OPTIONS, "iters": 3}  # before two steps are nearly equal
quantize_weight(torch.randn(64, 64).bfloat16(), 4, 64)
weight = torch.empty(2048, 4096, dtype=torch.bfloat16)
for row in weight:
    row.normal_(std=0.02)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize_weight(weight, 4, 64)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 24
