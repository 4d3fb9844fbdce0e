from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from quant.artifact import load_quantized, save_quantized
from quant.artifact.sizes import (
    dense_bytes,
    folder_bytes,
    parameter_count,
    stored_tensors,
    true_bits_per_weight,
    true_bytes,
)
from quant.layers.linear import quant_linears
from quant.quant_spec import QuantSpec
from quant.quantize import quantize

EMBEDDING, LAYER = 256 * 64, 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
NORMS = 5 * 64


def file_bytes(model, folder) -> int:
    """Size of the weights' file without its header."""
    path = save_quantized(model, folder, model.quant_spec) / "quantized.safetensors"
    return path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1])
def test_bytes_are_the_formulas_and_the_files(make_llama, tmp_path, tied, bits):
    model = make_llama(tied=tied)
    weights = (1 if tied else 2) * EMBEDDING + 2 * LAYER + NORMS
    assert parameter_count(model) == weights
    assert dense_bytes(model) == 2 * weights and dense_bytes(model, 4) == true_bytes(model)
    quantize(model, QuantSpec(bits, 32, "rtn"), dtype=torch.bfloat16)
    assert parameter_count(model) == weights
    expected = 2 * (weights - 2 * LAYER) + 2 * LAYER * bits // 8 + 2 * LAYER * 4 // 32
    assert true_bytes(model) == expected == file_bytes(model, tmp_path / "model")
    assert true_bits_per_weight(model) == 8 * expected / weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefer", ["speed", "memory", "plain"])
def test_quantized_embeddings_and_head_count_once_whatever_a_kernel_holds(
    make_llama, tmp_path, tied, prefer
):
    spec = QuantSpec(4, 32, embeddings=True, head=True)
    model = quantize(make_llama(tied=tied), spec, dtype=torch.bfloat16)
    quantized = (1 if tied else 2) * EMBEDDING + 2 * LAYER
    expected = quantized // 2 + quantized * 4 // 32 + 2 * NORMS
    assert true_bytes(model) == expected == file_bytes(model, tmp_path / "model")
    assert parameter_count(model) == quantized + NORMS
    loaded = load_quantized(tmp_path / "model", prefer=prefer)
    assert true_bytes(loaded) == expected == file_bytes(loaded, tmp_path / "again")
    assert parameter_count(loaded) == quantized + NORMS
    assert sum(t.nbytes for t in stored_tensors(loaded)[0].values()) == expected


def test_transposed_layers_biases_and_positions_of_gpt2(tmp_path):
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    weights, biases = 2 * 12 * 64 * 64, 2 * (3 + 1 + 4 + 1) * 64
    others = 256 * 64 + 32 * 64 + 2 * (2 * 2 + 1) * 64
    assert parameter_count(model) == weights + biases + others
    quantize(model, QuantSpec(3, 64, "rtn"), dtype=torch.bfloat16)
    assert parameter_count(model) == weights + biases + others
    expected = weights * 3 // 8 + weights * 4 // 64 + 2 * (biases + others)
    assert true_bytes(model) == expected == file_bytes(model, tmp_path / "model")


def test_a_layer_under_two_names_counts_once(make_llama, tmp_path):
    model = make_llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    weights = 2 * EMBEDDING + 2 * LAYER - 64 * 128
    assert parameter_count(model) == weights + NORMS
    quantize(model, QuantSpec(8, 64, "rtn"), dtype=torch.bfloat16)
    assert parameter_count(model) == weights + NORMS
    layers = weights - 2 * EMBEDDING
    expected = layers + layers * 4 // 64 + 2 * (2 * EMBEDDING + NORMS)
    assert true_bytes(model) == expected == file_bytes(model, tmp_path / "model")


def test_two_parameters_of_one_memory_count_once(make_llama, tmp_path):
    """As `load_state_dict(..., assign=True)` leaves a tied model."""
    model = quantize(make_llama(tied=True), QuantSpec(4, 32, "rtn"), dtype=torch.bfloat16)
    before = parameter_count(model)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.data, False)
    assert parameter_count(model) == before == EMBEDDING + 2 * LAYER + NORMS
    model.save_pretrained(tmp_path / "model")
    assert parameter_count(load_quantized(tmp_path / "model")) == before


def test_mixed_bits(make_llama, tmp_path):
    layers = {"*.up_proj": QuantSpec(8, "channel", "rtn"), "*.down_proj": None}
    model = quantize(make_llama(), QuantSpec(2, 16, "rtn"), layers, torch.bfloat16)
    one = 64 * 128
    rest = LAYER - 2 * one
    each = (one + 128 * 4) + 2 * one + (rest // 4 + rest * 4 // 16)
    expected = 2 * each + 2 * (2 * EMBEDDING + NORMS)
    assert true_bytes(model) == expected == file_bytes(model, tmp_path / "model")


def test_a_dense_weight_kept_for_evaluation_does_not_count(make_llama):
    model = quantize(make_llama(), QuantSpec(4, 32), dtype=torch.bfloat16)
    before = true_bytes(model)
    for layer in quant_linears(model).values():
        layer.keep_dense(torch.bfloat16)
    assert true_bytes(model) == before


def test_models_on_the_meta_device_are_counted(make_llama):
    for tied in (True, False):
        with torch.device("meta"):
            model = make_llama(tied=tied)
        assert parameter_count(model) == parameter_count(make_llama(tied=tied))
        assert true_bytes(model) == true_bytes(make_llama(tied=tied))


def test_the_bytes_of_a_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"x" * 10)
    (tmp_path / "a" / "b" / "two").write_bytes(b"x" * 7)
    assert folder_bytes(tmp_path) == 17
    with pytest.raises(ValueError, match="this is no folder"):
        folder_bytes(tmp_path / "none")
