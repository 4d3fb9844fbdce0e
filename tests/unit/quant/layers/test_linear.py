from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from quant.codes import Codes
from quant.layers.linear import QuantLinear, dense_weights
from quant.methods import quantize_weight


def random_layer(bits: int = 4, group: int = 16, bias: bool = True) -> tuple[QuantLinear, dict]:
    generator = torch.Generator().manual_seed(bits)
    parts = {
        "codes": torch.randint(1 << bits, (24, 48), generator=generator).to(torch.uint8),
        "scale": torch.rand(24, 48 // group, generator=generator).half() * 0.1 + 0.01,
        "zero": torch.rand(24, 48 // group, generator=generator).half() * (1 << bits),
        "bias": torch.randn(24, generator=generator) if bias else None,
    }
    return QuantLinear.from_codes(
        Codes(parts["codes"], parts["scale"], parts["zero"], bits), parts.get("bias")
    ), parts


def weight_in_float64(parts: dict) -> np.ndarray:
    codes, scale, zero = (parts[n].double().numpy() for n in ("codes", "scale", "zero"))
    group = codes.shape[1] // scale.shape[1]
    return (codes - zero.repeat(group, axis=1)) * scale.repeat(group, axis=1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [8, 16, 48])
def test_dequantize_and_forward_are_float64s(bits, group):
    layer, parts = random_layer(bits, group)
    weight = weight_in_float64(parts)
    np.testing.assert_allclose(layer.dequantize(torch.float64).numpy(), weight, rtol=1e-14)
    np.testing.assert_allclose(layer.dequantize(torch.float32).numpy(), weight, rtol=2e-7)
    x = torch.randn(2, 3, 48)
    expected = x.double().numpy() @ weight.T + parts["bias"].double().numpy()
    np.testing.assert_allclose(layer(x).numpy(force=True), expected, rtol=1e-4, atol=1e-4)
    out = layer(x.bfloat16())
    assert out.dtype == torch.bfloat16
    np.testing.assert_allclose(out.float().numpy(force=True), expected, rtol=0.05, atol=1.0)


def test_weight_is_rounded_once():
    layer, parts = random_layer()
    expected = torch.from_numpy(weight_in_float64(parts)).float().bfloat16()
    assert torch.equal(layer.dequantize(torch.bfloat16), expected)


def test_dense_weight_changes_no_result_and_is_not_saved():
    layer, _ = random_layer()
    x = torch.randn(5, 48).bfloat16()
    plain, keys = layer(x), set(layer.state_dict())
    with dense_weights(layer, torch.bfloat16):
        assert layer.dense is not None and layer.dense.dtype == torch.bfloat16
        assert torch.equal(layer(x), plain)
        assert torch.equal(layer(x.float()), random_layer()[0](x.float()))
        assert set(layer.state_dict()) == keys == {"codes", "scale", "zero", "bias"}
        layer.float()  # would turn the bfloat16 weight into a float32 one of less precision
        assert torch.equal(layer(x.float()), random_layer()[0](x.float()))
    assert layer.dense is None


def test_scale_and_zero_keep_float16_when_the_model_is_cast():
    layer, _ = random_layer()
    before = layer.dequantize()
    model = torch.nn.Sequential(layer).to(torch.bfloat16)
    assert layer.scale.dtype == layer.zero.dtype == torch.float16
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(model[0].dequantize(), before)
    assert layer.to("meta").scale.device.type == "meta"


def test_pickles_and_differentiates_through_the_input():
    layer, parts = random_layer()
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, 48, requires_grad=True)
    assert torch.equal(again(x), layer(x))
    layer(x).sum().backward()
    np.testing.assert_allclose(x.grad[0].numpy(), weight_in_float64(parts).sum(0), rtol=1e-3)


@pytest.mark.parametrize("prefer", ["plain", "speed"])
def test_the_gradient_goes_straight_through_the_rounding_of_inputs(prefer):
    torch.manual_seed(0)
    weight = quantize_weight(torch.randn(64, 128), 8, "channel", "int8-dynamic")
    layer = QuantLinear.from_codes(weight, activations="int8")
    layer.use_kernel(prefer)
    x = torch.randn(4, 128, requires_grad=True)
    y, back = layer(x), torch.randn(4, 64)
    with torch.no_grad():
        assert torch.allclose(y, layer(x.detach()), rtol=1e-5, atol=1e-5)
    y.backward(back)
    assert torch.allclose(x.grad, back @ weight.dequantize(), rtol=1e-4, atol=1e-4)


def test_refuses_widths_that_do_not_fit():
    with pytest.raises(ValueError, match="group of 32 .* width of 48"):
        QuantLinear(48, 8, 4, 32)
    with pytest.raises(ValueError, match="multiple of 8"):
        QuantLinear(12, 8, 4, 4)
    with pytest.raises(ValueError, match="bits may be 1 to 8"):
        QuantLinear(48, 8, 16, 16)
    codes = torch.zeros(4, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not divide"):
        Codes(codes, torch.ones(4, 5), torch.ones(4, 5), 4)
    with pytest.raises(ValueError, match="must both be"):
        Codes(codes, torch.ones(4, 3), torch.ones(4, 6), 4)
