"""The layout of compressed-tensors, checked against that package."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

from quant.codes import Codes
from quant.export.hf.compressed_tensors import (
    Packed,
    Scheme,
    agree,
    joined_layers,
    pack_words,
    quantization_config,
)
from quant.export.hf.requantize import absmax, rounded_zeros, same_codes, searched


def random_codes(
    bits: int, rows: int = 24, columns: int = 128, group: int = 32, seed: int = 0
) -> Codes:
    """Codes with zero points that are fractions, as hqq makes them."""
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=made, dtype=torch.uint8)
    scale = torch.rand(rows, columns // group, generator=made) * 0.1 + 0.01
    zero = torch.rand(rows, columns // group, generator=made) * ((1 << bits) - 1)
    return Codes(codes, scale.half(), zero.half(), bits)


def loaded(packed: Packed) -> torch.Tensor:
    """The weight that the compressed-tensors package makes of the file's tensors."""
    config = packed.scheme.config(
        packed.codes.shape[1], torch.int8 if packed.zero is None else packed.zero.dtype
    )
    scheme = QuantizationScheme(targets=["Linear"], **config)
    compressor = BaseCompressor.get_value_from_registry(packed.scheme.format)
    return compressor.decompress(packed.tensors(), scheme)["weight"]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [8, 40, 64])
def test_words_are_those_of_the_package(bits: int, columns: int) -> None:
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, columns)).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(codes, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_package_reads_the_same_weight(
    bits: int, group: int | None, dtype: torch.dtype
) -> None:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(1))
    for packed in (
        absmax(weight, Scheme(bits, group), dtype),
        searched(weight, None, Scheme(bits, group), dtype),
        searched(weight, None, Scheme(bits, group, "asymmetric"), dtype),
    ):
        assert torch.equal(loaded(packed), packed.weight(dtype))
        error = float((loaded(packed).float() - weight).norm() / weight.norm())
        # A step is at most 2 * 4.2 sigma / 2**bits, and its rounding uniform.
        assert error < 8.4 / (1 << bits) / 12**0.5 + (0.004 if dtype is torch.bfloat16 else 0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_exact_keeps_fractional_zero_points(bits: int) -> None:
    codes = random_codes(bits)
    packed = same_codes(codes, Scheme(bits, 32, "exact"), torch.float32)
    torch.testing.assert_close(loaded(packed), codes.dequantize(), rtol=1e-6, atol=1e-6)


def test_dynamic_keeps_codes_and_refuses_zero_points() -> None:
    codes = random_codes(8, group=128)
    with pytest.raises(ValueError, match="codes with a zero point cannot be stored as int8"):
        same_codes(codes, Scheme(8, None, "dynamic"), torch.float32)
    middle = Codes(codes.codes, codes.scale, torch.full_like(codes.zero, 128), 8)
    packed = same_codes(middle, Scheme(8, None, "dynamic"), torch.float32)
    assert torch.equal(loaded(packed), middle.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_on_the_grid_are_held_exactly(bits: int) -> None:
    """Symmetric rtn: zero points at the middle need no other scale."""
    codes = random_codes(bits)
    middle = Codes(codes.codes, codes.scale, torch.full_like(codes.zero, 1 << (bits - 1)), bits)
    packed = searched(middle.dequantize(), middle, Scheme(4, 32), torch.float32)
    torch.testing.assert_close(packed.weight(torch.float32), middle.dequantize())


def test_integer_zero_points_are_held_exactly() -> None:
    codes = random_codes(4)
    whole = Codes(codes.codes, codes.scale, codes.zero.round(), 4)
    packed = rounded_zeros(whole.dequantize(), whole, Scheme(4, 32, "asymmetric"), torch.float32)
    assert torch.equal(packed.codes + 8, whole.codes)
    torch.testing.assert_close(loaded(packed), whole.dequantize())


@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_codes_gain_from_a_wider_grid(bits: int) -> None:
    """q -> k q and round(k z): a rounded zero point is wrong by half of a step k times smaller."""
    codes, times = random_codes(bits), 15 // ((1 << bits) - 1)
    scheme = Scheme(4, 32, "asymmetric")
    packed = rounded_zeros(codes.dequantize(), codes, scheme, torch.float32)
    steps = (packed.weight(torch.float32) - codes.dequantize()).unflatten(1, (-1, 32))
    worst = (steps / codes.scale.float().unsqueeze(-1)).abs().max()
    assert worst <= 0.5 / times + 1e-3


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_searching_never_loses(kind: str) -> None:
    codes = random_codes(3, seed=4)
    weight, scheme = codes.dequantize(), Scheme(4, 32, kind)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(2)) * 10

    def error(packed: Packed, weighs: torch.Tensor) -> float:
        return float(((packed.weight(torch.float32) - weight).double().square() * weighs).sum())

    plain = searched(weight, codes, scheme, torch.float32)
    weighed = searched(weight, codes, scheme, torch.float32, importance)
    flat = torch.ones(128, dtype=torch.float64)
    assert error(plain, flat) < error(absmax(weight, Scheme(4, 32), torch.float32), flat)
    assert error(weighed, importance) < error(plain, importance)


def test_weights_of_zero_and_of_one_sign() -> None:
    weight = torch.zeros(8, 64)
    weight[1] = torch.linspace(0.5, 1.0, 64)
    weight[2] = -weight[1]
    for kind in ("symmetric", "asymmetric"):
        packed = searched(weight, None, Scheme(4, 32, kind), torch.float32)
        assert torch.equal(loaded(packed)[0], weight[0])
        assert float((loaded(packed) - weight).abs().max()) < 0.07


def test_config_names_heads_and_ignores_the_rest() -> None:
    weight = torch.randn(8, 64)
    packed = {name: absmax(weight, Scheme(4, 32), torch.float32) for name in ("model.a", "lm_head")}
    made = quantization_config(packed, ["model.a", "model.b", "lm_head"], False)
    assert made["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert made["ignore"] == ["model.b"]
    packed["model.b"] = absmax(weight, Scheme(8, None), torch.float32)
    made = quantization_config(packed, ["model.a", "model.b", "lm_head"], False)
    assert [group["targets"] for group in made["config_groups"].values()] == [
        ["model.a", "lm_head"],
        ["model.b"],
    ]
    QuantizationConfig.model_validate(made)


def test_joined_layers_share_the_most_bits_and_the_smallest_groups() -> None:
    attention = {f"model.layers.0.self_attn.{n}": Scheme(4, 64) for n in ("q_proj", "k_proj")}
    value, output = "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj"
    schemes = {**attention, value: Scheme(8, 128), output: Scheme(4, 32)}
    agreed, notes = agree(schemes)
    assert {agreed[name] for name in (*attention, value)} == {Scheme(8, 64)}
    assert agreed[output] == Scheme(4, 32)
    assert len(notes) == 1 and all(name in notes[0] for name in (*attention, value))
    agreed, notes = agree({**schemes, value: None})
    assert {agreed[name] for name in (*attention, value)} == {None}
    assert "16 bits" in notes[0]
    dynamic = {f"m.{n}_proj": Scheme(8, None, "dynamic") for n in ("gate", "up")}
    assert agree(dynamic) == (dynamic, [])
    assert joined_layers(["a.gate_proj", "b.up_proj", "a.down_proj"]) == []
