"""Scales, zero points and vectors of a quantized model in training, against float64 autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quant.codes
from quant.artifact import load_quantized, save_quantized
from quant.codes import Codes
from quant.kernels import use_kernels
from quant.layers.linear import QuantEmbedding, QuantLinear, quant_linears, quant_weights
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from quant.recovery.trainable import LARGEST, Trainable, trainable
from tests.fixtures.kernel_layers import random_codes
from tests.fixtures.model_families import tiny


class Exact:
    """A weight in float64 with autograd: the formula of `trainable`, and nothing else."""

    def __init__(self, codes: Codes) -> None:
        self.codes, self.first = codes.codes.double(), codes.scale.double()
        self.change = torch.zeros_like(self.first, requires_grad=True)
        self.zero = codes.zero.double().requires_grad_(True)

    def weight(self) -> Tensor:
        size = self.codes.shape[1] // self.first.shape[1]
        scale, zero = self.first * self.change.exp(), self.zero
        return (self.codes - zero.repeat_interleave(size, 1)) * scale.repeat_interleave(size, 1)

    def check(self, parts: Trainable, tolerance: float = 1e-5) -> None:
        """The gradients are those of the first quantized weight of `parts`; 0 where all codes of
        a group are equal."""
        low, high = self.codes.unflatten(1, (self.first.shape[1], -1)).aminmax(dim=2)
        for found, exact in zip(parts.parameters(), (self.change, self.zero), strict=False):
            assert found.dtype == torch.float32 and found.grad is not None
            assert exact.grad is not None
            close(found.grad, exact.grad * (low != high), tolerance)


def close(found: Tensor, exact: Tensor | None, tolerance: float = 1e-5) -> None:
    assert exact is not None
    size = float(exact.detach().abs().max())
    np.testing.assert_allclose(
        found.detach().double().numpy(), exact.detach().numpy(), rtol=0, atol=tolerance * size
    )


class Tied(nn.Module):
    """A table, and a head on its codes."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.table = QuantEmbedding.from_codes(codes, torch.float32)
        self.head = QuantLinear.share(self.table)


@pytest.fixture(params=[1 << 19, 700], ids=["whole", "in pieces"])
def pieces(request, monkeypatch) -> None:
    monkeypatch.setattr(quant.codes, "CHUNK", request.param)


@pytest.mark.parametrize(("bits", "group"), [(1, 8), (2, 64), (3, 32), (4, 256), (6, 16), (8, 64)])
def test_gradients_of_a_linear_layer_are_float64s(pieces, bits, group):
    codes = random_codes(bits, group, rows=24)
    bias, x = torch.randn(24), torch.randn(3, 5, 256)
    weights = torch.randn(3, 5, 24)
    exact, exact_x = Exact(codes), x.double().requires_grad_(True)
    exact_bias = bias.double().requires_grad_(True)
    y = exact_x @ exact.weight().t() + exact_bias
    (y.tanh() * weights.double()).sum().backward()

    x.requires_grad_(True)
    model = nn.Sequential(QuantLinear.from_codes(codes, bias))
    with trainable(model) as parts:
        with parts.gradients():
            found = model(x)
            (found.tanh() * weights).sum().backward()
        close(found, y)
        exact.check(parts)
        close(parts.parameters()[2].grad, exact_bias.grad)
        close(x.grad, exact_x.grad)


def test_gradients_of_a_lookup_are_float64s(pieces):
    codes = random_codes(3, 32)
    ids = torch.tensor([[0, 95, 3, 3], [3, 7, 0, 1]])
    weights = torch.randn(2, 4, 256)
    exact = Exact(codes)
    rows = exact.weight()[ids]
    (rows.tanh() * weights.double()).sum().backward()
    model = nn.Sequential(QuantEmbedding.from_codes(codes, torch.float32))
    with trainable(model) as parts:
        with parts.gradients():
            found = model(ids)
            (found.tanh() * weights).sum().backward()
        close(found, rows)
        exact.check(parts)
        assert not parts.parameters()[0].grad[50].any(), "a row that nobody asked for"


@pytest.mark.parametrize("called", [True, False], ids=["head called", "head's weight read"])
def test_gradients_of_a_tied_head_and_its_table_are_added(pieces, called):
    codes = random_codes(2, 64)
    ids = torch.tensor([4, 0, 95, 4])
    exact = Exact(codes)
    weight = exact.weight()
    weight[ids].tanh().matmul(weight.t()).tanh().square().sum().backward()
    model = Tied(codes)
    with trainable(model) as parts:
        assert len(parts.parameters()) == 2
        with parts.gradients():
            hidden = model.table(ids).tanh()
            logits = model.head(hidden) if called else hidden @ model.head.weight.t()
            logits.tanh().square().sum().backward()
        exact.check(parts, 2e-5)


def test_a_group_sum_of_bfloat16_is_taken_in_float32():
    codes = random_codes(4, 256, rows=8)
    x = torch.ones(1, 256).bfloat16()
    model = nn.Sequential(QuantLinear.from_codes(codes))
    with trainable(model) as parts:
        with parts.gradients():
            model(x).float().sum().backward()
        # Every dL/dw is 1; in bfloat16 a sum of 256 codes would be off by up to 8.
        q, s, z = codes.codes.double(), codes.scale.double(), codes.zero.double()
        change, zero = parts.parameters()
        close(change.grad, s * (q.sum(1, keepdim=True) - 256 * z), 1e-6)
        close(zero.grad, -256 * s, 1e-6)


def test_an_input_gradient_of_bfloat16_is_added_up_in_float32(monkeypatch):
    monkeypatch.setattr(quant.codes, "CHUNK", 256)  # a row at a time
    codes = random_codes(4, 64, rows=512)
    grad = torch.rand(4, 512).bfloat16()
    model = nn.Sequential(QuantLinear.from_codes(codes))
    x = torch.zeros(4, 256).bfloat16().requires_grad_(True)
    with trainable(model) as parts, parts.gradients():
        model(x).backward(grad)
    exact = grad.double() @ codes.dequantize(torch.bfloat16).double()
    error = (x.grad.double() - exact).norm() / exact.norm()
    assert float(error) < 2**-8, "of one rounding, not of hundreds"


def quantized(make_llama: Callable, ends: bool = False, bits: int = 2, **how) -> nn.Module:
    return quantize(make_llama(tied=ends), QuantSpec(bits, 32, "hqq", ends, ends), **how)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ends", [False, True])
def test_the_model_in_training_gives_the_logits_of_the_one_that_is_saved(
    make_llama, tmp_path, ends, dtype
):
    model = quantized(make_llama, ends, dtype=dtype)
    ids = torch.arange(40).view(2, 20)
    before = {name: layer.unpacked().codes.clone() for name, layer in quant_weights(model).items()}
    plain = model(ids).logits
    with trainable(model) as parts:
        optimizer = torch.optim.AdamW(parts.parameters(), lr=0.03, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            with parts.gradients():
                model(ids).logits.float().square().mean().backward()
            optimizer.step()
            parts.write()
        assert all(parameter.grad.abs().sum() > 0 for parameter in parts.parameters())
        with parts.gradients(), torch.no_grad():
            trained = model(ids).logits
    assert not torch.equal(trained, plain)
    assert torch.equal(model(ids).logits, trained), "the same, without gradients"
    save_quantized(model, tmp_path / "saved", model.quant_spec)
    loaded = load_quantized(tmp_path / "saved", prefer="plain")
    assert torch.equal(loaded(ids).logits, trained), "and from the disk"
    for name, layer in quant_weights(loaded).items():
        assert torch.equal(layer.unpacked().codes, before[name])
        held = layer.stored()
        assert held["scale"].dtype == held["zero"].dtype == torch.float16
    assert {p.dtype for p in model.parameters()} == {dtype}


KEPT = {"mixtral": ["*.experts*", "*.gate*"], "mamba": ["*conv1d*", "*A_log*", "*.dt_proj"]}


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "mixtral", "mamba"])
def test_every_layer_of_other_families_has_gradients(family):
    keep = dict.fromkeys(KEPT.get(family, []))
    model = quantize(tiny(family), QuantSpec(3, 16), layers=keep, dtype=torch.float32)
    ids = torch.arange(24).view(2, 12)
    plain = model(ids, use_cache=False).logits
    with trainable(model) as parts, parts.gradients():
        found = model(ids, use_cache=False).logits
        assert torch.equal(found, plain)
        found.square().mean().backward()
        assert all(parameter.grad is not None for parameter in parts.parameters())


def test_matrices_in_16_bits_stay_and_all_vectors_are_trained(make_llama):
    model = quantized(make_llama)
    kept = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.arange(20)[None]
    with trainable(model) as parts:
        with parts.gradients():
            model(ids).logits.float().square().mean().backward()
        torch.optim.SGD(parts.parameters(), lr=1e3).step()
        parts.write()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[name]) == (parameter.ndim > 1), name
        assert parameter.grad is None and not parameter.requires_grad


def test_gradients_of_a_vector_are_summed_in_float32(make_llama):
    """Over micro-batches: in bfloat16 the small ones after a large one would be lost."""
    model = quantized(make_llama)
    norm = model.model.norm.weight
    with trainable(model) as parts:
        with parts.gradients():
            for share in (1.0, *[0.001] * 8):
                (norm.float() * share).sum().backward()
        grad = parts.parameters()[-1].grad
    np.testing.assert_allclose(grad.numpy(), 1.008, rtol=1e-4)


def test_what_is_stored_can_be_put_back(make_llama):
    model = quantized(make_llama, ends=True)
    ids = torch.arange(20)[None]
    plain = model(ids).logits
    with trainable(model) as parts:
        kept = parts.stored()
        with torch.no_grad():
            for parameter in parts.parameters():
                parameter.add_(0.1)
        parts.write()
        assert not torch.equal(model(ids).logits, plain)
        parts.put_back(kept)
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_scales_stay_finite_and_never_become_zero(make_llama, tmp_path, far):
    model = quantized(make_llama)
    with trainable(model) as parts:
        with torch.no_grad():
            for parameter in parts.parameters():
                parameter.add_(far)
        parts.write()
        parts.write()
    for layer in quant_weights(model).values():
        assert layer.scale.isfinite().all() and (layer.scale > 0).all()
        assert layer.zero.isfinite().all() and layer.zero.abs().max() <= LARGEST
    save_quantized(model, tmp_path / "saved", model.quant_spec)
    load_quantized(tmp_path / "saved")


def test_a_group_of_one_value_stays_as_it_is():
    """hqq gives it scale 1 and minus its value as zero point: a step of 1e-2 there would be as
    large as weights are."""
    codes = random_codes(4, 64, rows=8)
    codes.codes[2, 64:128] = 0
    codes.scale[2, 1], codes.zero[2, 1] = 1.0, -0.02
    model = nn.Sequential(QuantLinear.from_codes(codes))
    with trainable(model) as parts:
        optimizer = torch.optim.AdamW(parts.parameters(), lr=0.1)
        with parts.gradients():
            model(torch.randn(4, 256)).square().sum().backward()
        optimizer.step()
        parts.write()
    layer = model[0]
    changed = (layer.scale != codes.scale) & (layer.zero != codes.zero)
    assert not changed[2, 1] and int(changed.sum()) == changed.numel() - 1
    assert layer.scale[2, 1] == 1.0 and layer.zero[2, 1] == codes.zero[2, 1]


def test_no_dense_weight_is_kept_for_the_backward_pass(make_llama):
    model = quantized(make_llama)
    shapes = {(layer.rows, layer.columns) for layer in quant_linears(model).values()}
    saved: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            saved.append(tuple(tensor.shape))
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with trainable(model) as parts, parts.gradients(), hooks:
        model(torch.arange(20)[None]).logits.sum().backward()
    assert saved and not {*saved, *(shape[::-1] for shape in saved)} & shapes


def test_kernels_are_back_afterwards_with_the_new_scales(make_llama):
    model = quantized(make_llama, ends=True, bits=4)
    use_kernels(model, "speed")
    assert any(layer.kernel != "plain" for layer in quant_linears(model).values())
    names = {name: layer.kernel for name, layer in quant_linears(model).items()}
    ids = torch.arange(3)[None]
    with trainable(model) as parts:
        with torch.no_grad():
            for parameter in parts.parameters():
                parameter.add_(0.05)
        parts.write()
    assert {name: layer.kernel for name, layer in quant_linears(model).items()} == names
    found = model(ids).logits.float()
    plain = copy.deepcopy(model)
    use_kernels(plain, "plain")
    expected = plain(ids).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_an_error_leaves_an_ordinary_model(make_llama):
    model = quantized(make_llama, ends=True)
    layers = quant_weights(model)
    with pytest.raises(RuntimeError), trainable(model) as parts, parts.gradients():
        assert not quant_weights(model)
        raise RuntimeError
    assert quant_weights(model) == layers
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_trained_is_refused(make_llama):
    with pytest.raises(ValueError, match="holds no quantized layer"), trainable(make_llama()):
        pass
    model = quantize(make_llama(), QuantSpec(8, "channel", "int8-dynamic"))
    with pytest.raises(ValueError, match="q_proj rounds its activations to int8"), trainable(model):
        pass
