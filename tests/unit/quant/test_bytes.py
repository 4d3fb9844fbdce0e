from __future__ import annotations

import pytest
import torch

from quant.artifact import save_quantized
from quant.bytes import dense_bytes, parameter_count, true_bits_per_weight, true_bytes
from quant.quantize import quantize
from quant.spec import QuantSpec

EMBEDDING, LAYER = 256 * 64, 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
NORMS = 5 * 64


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1])
def test_bytes_are_the_formulas_and_the_files(make_llama, tmp_path, tied, bits):
    spec = QuantSpec(bits, 32)
    model = make_llama(tied=tied)
    weights = (1 if tied else 2) * EMBEDDING + 2 * LAYER + NORMS
    assert parameter_count(model) == weights
    assert dense_bytes(model) == 2 * weights and dense_bytes(model, 4) == true_bytes(model)
    quantize(model, spec)
    assert parameter_count(model) == weights
    expected = 2 * (weights - 2 * LAYER) + 2 * LAYER * bits // 8 + 2 * LAYER * 4 // 32
    assert true_bytes(model) == expected
    assert true_bits_per_weight(model) == 8 * expected / weights
    path = save_quantized(model, tmp_path, spec) / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == expected


def test_a_dense_weight_kept_for_evaluation_does_not_count(make_llama):
    model = quantize(make_llama(), QuantSpec(4, 32))
    before = true_bytes(model)
    model.model.layers[0].mlp.up_proj.keep_dense(torch.bfloat16)
    assert true_bytes(model) == before


def test_models_on_the_meta_device_are_counted(make_llama):
    for tied in (True, False):
        with torch.device("meta"):
            model = make_llama(tied=tied)
        assert parameter_count(model) == parameter_count(make_llama(tied=tied))
        assert true_bytes(model) == true_bytes(make_llama(tied=tied))
