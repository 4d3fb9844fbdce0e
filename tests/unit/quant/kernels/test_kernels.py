from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from quant.codes import CHUNK, Codes
from quant.kernels import int8_dynamic, kernel_names, native, use_kernels
from quant.kernels.blocks import on_grid
from quant.kernels.int4 import FEW, Int4, Int4Layout, find_layout
from quant.kernels.int8_dynamic import Int8Dynamic
from quant.kernels.kernel import Refused
from quant.layers.linear import QuantEmbedding, QuantLinear, dense_weights
from quant.methods import quantize_weight
from tests.fixtures.kernel_layers import (
    heavy_tailed,
    random_codes,
    random_input,
    relative_error,
    weight_in_float64,
)

NONE = "no op here"
INT8 = "int8 x int8 in float32" if int8_dynamic.saturates() else "int8 x int8"
BOTH = pytest.mark.parametrize("op", [False, True], indirect=True)
KINDS = [(bits, 64, None) for bits in (8, 6, 5, 4, 3, 2, 1)] + [(8, 256, "int8")]


@pytest.fixture(autouse=True)
def op(request, monkeypatch):
    """Whether the C++ op is there, which has tests of its own; without it torch's kernels run."""
    if not getattr(request, "param", False):
        monkeypatch.setattr(native, "unavailable", lambda: NONE)


def made(bits=4, group=64, activations=None, rows=96, columns=256):
    codes = random_codes(bits, group, rows, columns, whole=activations is not None)
    return QuantLinear.from_codes(codes, activations=activations), codes


def tensors_of(layer):
    """All tensors that the layer or its kernel hold."""
    held = [*layer._buffers.values(), *vars(layer._kernel or object).values()]
    return {id(t): t for t in held if isinstance(t, torch.Tensor)}.values()


def bytes_of(layer):
    return sum(t.numel() * t.element_size() for t in tensors_of(layer))


@pytest.mark.parametrize(("bits", "group", "activations"), KINDS)
def test_agrees_with_float64_for_1_to_60_rows(bits, group, activations):
    layer, codes = made(bits, group, activations)
    weight = weight_in_float64(codes)
    described = use_kernels(layer)[""]
    assert layer.kernel == described and not described.startswith("plain")
    # int8 activations have an error of their own; the next test has its arithmetic.
    limit = 0.02 if activations else 0.005
    for rows in (*range(1, 10), *range(30, 35), 40, *range(54, 60)):
        assert relative_error(layer, random_input(rows, 256), weight) < limit, rows
    for shape in ((2, 3, 256), (256,), (0, 256), (1, 1, 256)):
        x = random_input(6, 256)[:, :].flatten()[: int(np.prod(shape))].view(shape)
        assert layer(x).shape == (*shape[:-1], 96)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(("bits", "group", "activations"), KINDS)
def test_agrees_with_the_plain_path_in_every_dtype(bits, group, activations, few):
    layer, _ = made(bits, group, activations)
    plain = copy.deepcopy(layer)
    use_kernels(layer)
    for dtype, limit in ((torch.bfloat16, 0.006), (torch.float32, 0.005), (torch.float16, 0.005)):
        x = random_input(3 if few else 70, 256, dtype)
        expected = plain(x).double()
        error = (layer(x).double() - expected).norm() / expected.norm()
        assert error < limit
        if activations and dtype == torch.float32:  # whole numbers: nothing but float's rounding
            assert error < 1e-6
        if not activations and not few and dtype == torch.float32:  # the very same weight
            assert error < 1e-6


def test_many_rows_see_the_very_weight_of_the_plain_path():
    for bits in (1, 2, 3, 4, 5, 6, 8):
        layer, codes = made(bits, 32, rows=80)
        use_kernels(layer)
        eye = torch.eye(256).bfloat16()
        assert len(eye) > max(FEW.values())
        assert torch.equal(layer(eye), codes.dequantize(torch.bfloat16).t())


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]),
    group=st.sampled_from([32, 64, 96, 128, 256, 512]),
    groups=st.integers(1, 3),
    rows=st.integers(1, 150),
    tokens=st.sampled_from([1, 2, 5, 33, 58]),
)
def test_any_shape_gives_the_product_and_its_codes_back(bits, group, groups, rows, tokens):
    layer, codes = made(bits, group, rows=rows, columns=group * groups)
    stored = {name: tensor.clone() for name, tensor in layer.stored().items()}
    assert not use_kernels(layer)[""].startswith("plain")
    assert layer.codes is None
    for name, tensor in layer.stored().items():
        assert torch.equal(tensor, stored[name]) and tensor.dtype == stored[name].dtype
    assert torch.equal(layer.unpacked().codes, codes.codes)
    if rows >= 16:  # one output alone may nearly cancel
        x = random_input(tokens, group * groups)
        assert relative_error(layer, x, weight_in_float64(codes)) < 0.01


def test_zero_points_far_outside_the_codes():
    for bits, kind in ((4, "int4"), (8, "int8")):
        codes = random_codes(bits, 64)
        codes = Codes(codes.codes, codes.scale, codes.zero - 3 * (1 << bits), bits)
        layer = QuantLinear.from_codes(codes)
        assert use_kernels(layer)[""].startswith(kind)
        assert relative_error(layer, random_input(4, 256), weight_in_float64(codes)) < 0.01


@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("group", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1])
def test_inputs_with_a_mean_and_weights_with_outliers(bits, group, mean):
    """What bfloat16 rounds off a group's offset adds up over inputs of one sign."""
    weight = heavy_tailed(bits, group)
    kernel = Int4(weight)
    assert torch.equal(kernel.unpacked().codes, weight.unpacked().codes)
    dense = weight.unpacked().dequantize(torch.float64)
    for rows in (1, 4, kernel.few):  # for more the weight itself is rounded to bfloat16
        x = random_input(rows, 512) + mean
        expected = x.double() @ dense.t()
        error = (kernel(x).double() - expected).norm() / expected.norm()
        assert error < 0.009, rows


def test_offsets_are_mended_only_where_that_would_be_seen():
    assert Int4(heavy_tailed(4, 512)).summed and not Int4(heavy_tailed(8, 512)).summed
    torch.manual_seed(0)
    codes = quantize_weight(torch.randn(256, 512) * 0.02, 4, 64)
    layer = QuantLinear.from_codes(codes)
    assert not Int4(layer._weight()).summed


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    count=st.integers(1, 140),
    size=st.sampled_from([32, 64, 128, 256]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_values_on_the_kernels_grid_are_within_a_thirtieth_of_their_range(
    rows, count, size, scale, seed
):
    values = torch.randn(rows, count, generator=torch.Generator().manual_seed(seed)) * scale
    grid = on_grid(values, size)
    assert grid.codes.shape[1] % size == 0 and int(grid.codes.max()) <= 15
    wide, offset = (
        part.repeat_interleave(size, 1)[:, :count] for part in (grid.scale, grid.offset)
    )
    made = (grid.codes[:, :count].float() - 8) * wide + offset
    ranges = 15 * wide
    assert bool(((made - values).abs() <= ranges / 30 * 1.001 + 1e-6 * values.abs()).all())


def test_small_weights_far_from_the_middle_of_8_bits():
    """All codes near a zero point of 0: the offset of 136 s must cancel, scales in bfloat16 too."""
    held = random_codes(8, 128)
    codes = Codes(held.codes % 8, held.scale, torch.zeros_like(held.zero), 8)
    layer = QuantLinear.from_codes(codes)
    assert use_kernels(layer)[""].startswith("int8")
    x = random_input(4, 256).abs()
    assert relative_error(layer, x, weight_in_float64(codes)) < 0.005


@BOTH
def test_inputs_that_are_not_contiguous(op):
    for bits, group, activations in ((4, 64, None), (8, 64, None), (8, 256, "int8")):
        layer, codes = made(bits, group, activations)
        x = random_input(4, 512)[:, 128:384]
        expected = layer(x.contiguous())
        assert not use_kernels(layer)[""].startswith("plain")
        torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.1)


def test_int8_activations_are_rounded_per_token():
    layer, codes = made(8, 256, "int8")
    x = random_input(5, 256, torch.float32)
    x[1] *= 1000
    x[2] = 0
    scale = np.abs(x.numpy()).max(1, keepdims=True) / np.float32(127)
    whole = np.round(np.divide(x.numpy(), scale, where=scale > 0, out=np.zeros_like(x.numpy())))
    expected = (whole.astype(np.float64) * scale) @ weight_in_float64(codes).T
    for prefer in ("plain", "speed"):
        use_kernels(layer, prefer)
        np.testing.assert_allclose(layer(x).numpy(), expected, rtol=2e-5, atol=1e-4)
        with dense_weights(layer, torch.float32):
            np.testing.assert_allclose(layer(x).numpy(), expected, rtol=2e-5, atol=1e-4)
    assert layer.kernel == INT8


@pytest.mark.parametrize("columns", [32, 1024, 2560])
def test_int8_in_float32_is_exact_at_the_extremes(columns, monkeypatch):
    """For processors whose product of int8 is wrong, here asked for on any."""
    monkeypatch.setattr(int8_dynamic, "saturates", lambda: True)
    layer, codes = made(8, columns, "int8", columns=columns)
    extreme = Codes(codes.codes.fill_(255), codes.scale, codes.zero.fill_(128), 8)
    layer = QuantLinear.from_codes(extreme, activations="int8")
    assert use_kernels(layer)[""] == "int8 x int8 in float32"
    x = torch.full((2, columns), 127.0)
    expected = columns * 127.0 * 127 * codes.scale.double().t().expand(2, -1)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=0)


@BOTH
@pytest.mark.parametrize(("bits", "group", "activations"), KINDS)
def test_stored_form_in_state_dict_pickle_and_copy(bits, group, activations, op):
    layer, codes = made(bits, group, activations)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    use_kernels(layer)
    x = random_input(2, 256)
    expected = layer(x)
    state = layer.state_dict()
    assert set(state) == set(before) == {"codes", "scale", "zero"}
    assert all(torch.equal(state[name], before[name]) for name in before)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert other.kernel == layer.kernel and torch.equal(other(x), expected)
        assert use_kernels(other, "plain") == {"": "plain"}
        assert torch.equal(other.codes, before["codes"])
    for assign in (False, True):
        for prefer in ("speed", "plain"):
            other, _ = made(bits, group, activations)
            other.set_codes(Codes(codes.codes.flip(0), codes.scale, codes.zero, bits))
            use_kernels(other, prefer)
            assert other.load_state_dict(state, assign=assign)
            assert other.kernel == ("plain" if prefer == "plain" else layer.kernel)
            use_kernels(other)
            assert torch.equal(other(x), expected)
    empty = QuantLinear(256, 96, bits, group, device="meta", activations=activations)
    assert use_kernels(empty)[""] == "plain: no kernel for device meta"
    empty.load_state_dict(state, assign=True)
    assert empty.kernel == layer.kernel and torch.equal(empty(x), expected)


@BOTH
def test_pickles_hold_no_layout_of_this_processor(op):
    layer, _ = made()
    plain = pickle.dumps(layer)
    use_kernels(layer)
    assert abs(len(pickle.dumps(layer)) - len(plain)) < 100


def test_codes_are_held_once():
    for bits, kept in ((4, 4), (8, 8), (2, 4), (6, 8)):
        layer, codes = made(bits, rows=128, columns=512)
        use_kernels(layer)
        weights, groups = 128 * 512, 128 * 512 // 64
        copies = 1 if bits <= 4 else 2
        assert bytes_of(layer) == weights * kept // 8 + groups * 4 * (1 + copies)
    layer, _ = made(8, 256, "int8")
    use_kernels(layer)
    assert bytes_of(layer) == 96 * (256 + 4 + 4)


def test_prefer_chooses_layouts_and_is_reversible():
    model = torch.nn.ModuleDict(
        {f"b{bits}": made(bits)[0] for bits in (8, 6, 4, 3)} | {"g8": made(4, 8)[0]}
    )
    stored = {name: t.clone() for name, t in model.state_dict().items()}
    int4 = f"int4 to {FEW[1]} rows, then dequantize+matmul ({NONE})"
    int8 = f"int8 in two int4 planes to {FEW[2]} rows, then dequantize+matmul ({NONE})"
    speed = use_kernels(model)
    assert speed == {
        "b8": int8,
        "b6": int8,
        "b4": int4,
        "b3": int4,
        "g8": "plain: groups of 8 are no multiple of 32",
    }
    kernel = model["b4"]._kernel
    assert use_kernels(model) == speed and model["b4"]._kernel is kernel  # nothing done twice
    assert kernel_names(model) == f"{int4}; {int8}; plain"
    memory = use_kernels(model, "memory")
    assert memory["b8"] == int8 and memory["b4"] == int4
    assert memory["b6"] == "plain: 6-bit codes would take more memory in a kernel's layout"
    assert memory["b3"].startswith("plain: 3-bit codes")
    assert set(use_kernels(model, "plain").values()) == {"plain"}
    assert all(torch.equal(t, stored[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match="^prefer 'fast' is unknown; may be speed, memory, plain$"):
        use_kernels(model, "fast")
    assert kernel_names(torch.nn.Linear(2, 2)) == "dense"


@BOTH
def test_moves_and_casts_keep_the_weight(op):
    layer, codes = made(4)
    layer.bias = torch.nn.Parameter(torch.randn(96), requires_grad=False)
    use_kernels(layer)
    x, kernel = random_input(2, 256), layer._kernel
    expected = layer(x)
    layer.to(torch.float16).half()
    assert layer._kernel is kernel and layer.scale.dtype == torch.float16
    assert layer.bias.dtype == torch.float16
    torch.testing.assert_close(layer(x), expected, rtol=0.01, atol=0.05)
    layer.to("meta")
    assert layer.codes.device.type == "meta" and layer.kernel.startswith("plain: no kernel")


@BOTH
def test_gradients_of_the_input_come_from_the_plain_path(op):
    layer, codes = made(4)
    use_kernels(layer)
    x = random_input(2, 256, torch.float32).requires_grad_()
    layer(x).sum().backward()
    np.testing.assert_allclose(x.grad[0].numpy(), weight_in_float64(codes).sum(0), rtol=1e-3)


@BOTH
def test_infinite_scales_are_refused_by_name(op):
    codes = random_codes(4, 64)
    codes.scale[3, 1] = torch.inf
    layer = QuantLinear.from_codes(codes)
    assert use_kernels(layer)[""] == "plain: a scale or zero point is not finite"
    assert torch.equal(layer.stored()["scale"], codes.scale)


def test_a_layout_that_does_not_come_back_is_refused():
    codes = torch.randint(16, (64, 32), dtype=torch.uint8)
    layout = find_layout()
    assert torch.equal(layout.unpack(layout.pack(codes)), codes)
    wrong = torch.arange(layout.block).roll(1)
    with pytest.raises(Refused, match="not understood"):
        Int4Layout(layout.block, wrong).pack(codes)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_other_processors_orders_of_nibbles(block, monkeypatch):
    """Pairs of neighbouring rows, as ATen packs them without AVX-512."""

    def pairs(codes, inner=1):
        blocks = codes.to(torch.uint8).view(-1, block, codes.shape[1]).transpose(1, 2)
        return (blocks[..., ::2] | blocks[..., 1::2] << 4).flatten().view(len(codes), -1)

    monkeypatch.setattr("quant.kernels.int4._pack", pairs)
    layout = find_layout()
    assert layout.block == block and layout.order is not None
    codes = torch.randint(16, (128, 64), dtype=torch.uint8)
    assert torch.equal(layout.unpack(layout.pack(codes)), codes)
    layer, codes = made(4)
    use_kernels(layer)
    assert torch.equal(layer.unpacked().codes, codes.codes)
    assert relative_error(layer, random_input(80, 256), weight_in_float64(codes)) < 0.005


def test_whole_numbers_are_needed_for_int8():
    codes = random_codes(8, 256)
    layer = QuantLinear.from_codes(codes, activations="int8")
    assert use_kernels(layer)[""] == (
        "plain: zero points that are not whole do not fit the int8 kernel"
    )
    wide = Codes(codes.codes, codes.scale, torch.zeros_like(codes.zero), 8)
    layer = QuantLinear.from_codes(wide, activations="int8")
    assert "further than 8 bits" in use_kernels(layer)[""]
    assert relative_error(layer, random_input(3, 256), weight_in_float64(wide)) < 0.02


def test_zero_points_beyond_16_bit_integers_are_refused_for_int8():
    codes = random_codes(8, 256)
    far = torch.full_like(codes.zero, 65504.0)
    layer = QuantLinear.from_codes(Codes(codes.codes // 4, codes.scale, far, 8), activations="int8")
    assert "further than 8 bits" in use_kernels(layer)[""]


def test_int8_of_a_large_matrix_is_made_in_pieces():
    layer, codes = made(8, 1032, "int8", rows=1025, columns=1032)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype in (torch.int16, torch.int32):
                largest = max(largest, result.numel())
            return result

    with Watch():
        assert use_kernels(layer)[""] == INT8
        assert torch.equal(layer.unpacked().codes, codes.codes)
    assert 0 < largest <= CHUNK
    assert relative_error(layer, random_input(3, 1032), weight_in_float64(codes)) < 0.02


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_with_int8_activations_need_no_packed_codes(monkeypatch, shared):
    layer, codes = made(8, 256, "int8")
    if shared:
        layer = QuantLinear.share(QuantEmbedding.from_codes(codes), "int8")
    x = random_input(3, 256, torch.float32).requires_grad_()
    expected = layer(x)
    use_kernels(layer)
    monkeypatch.setattr(Int8Dynamic, "codes", None)
    assert torch.equal(layer(x), expected)
    with dense_weights(layer, torch.float32):
        assert torch.equal(layer(x), expected)
    monkeypatch.undo()
    assert torch.equal(layer.stored()["codes"], codes.codes)
