from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

from quant.artifact import FORMAT, load_quantized, read_description, save_quantized
from quant.artifact.sizes import true_bytes
from quant.layers.linear import QuantEmbedding, QuantLinear, quant_weights
from quant.quant_spec import BITS, QuantSpec
from quant.quantize import quantize

ROOT = Path(__file__).parents[4]
IDS = torch.arange(40).reshape(2, 20) * 5 % 256
FILES = ("quantized.safetensors", "quant.json", "config.json", "generation_config.json")
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SPECS = [
    *(QuantSpec(bits, size, "rtn") for bits in BITS for size in (8, 32, "channel")),
    *(QuantSpec(bits, 64, "hqq") for bits in BITS),
    QuantSpec(8, "channel", "int8-dynamic"),
]


def assert_same_model(ours, theirs):
    """Same tensors under the same names, same values to the last bit, same text."""
    assert theirs.__class__.__name__ == ours.__class__.__name__
    layers, others = quant_weights(ours), quant_weights(theirs)
    assert list(layers) == list(others)
    for name, layer in layers.items():
        other = others[name]
        assert type(other) is type(layer) and other.group_size == layer.group_size
        for part, tensor in layer.stored().items():
            assert torch.equal(tensor, other.stored()[part]), f"{name}.{part}"
    assert torch.equal(theirs(IDS).logits, ours(IDS).logits)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(theirs.generate(IDS, **settings), ours.generate(IDS, **settings))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.key)
def test_every_spec_makes_a_round_trip(make_llama, tmp_path, spec):
    model = quantize(make_llama(num_hidden_layers=1, attention_bias=True), spec)
    folder = save_quantized(model, tmp_path / "model", spec)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    loaded = load_quantized(folder, prefer="plain")
    assert_same_model(model, loaded)
    assert loaded.quant_spec == spec
    assert read_description(folder)["spec"] == spec.to_dict()


@pytest.mark.parametrize("bits", BITS)
def test_the_file_holds_the_weights_by_the_documented_layout(make_llama, tmp_path, bits):
    """Read by the safetensors library, unpacked by numpy, dequantized in float64."""
    model = quantize(make_llama(num_hidden_layers=1), QuantSpec(bits, 16, "rtn"))
    tensors = load_file(save_quantized(model, tmp_path / "a", model.quant_spec) / FILES[0])
    name = "model.layers.0.mlp.down_proj"
    stream = np.unpackbits(tensors[f"{name}.codes"].numpy(), axis=1, bitorder="little")
    codes = stream.reshape(64, 128, bits) @ (1 << np.arange(bits))
    scale, zero = (tensors[f"{name}.{part}"].double().numpy() for part in ("scale", "zero"))
    weight = (codes.reshape(64, 8, 16) - zero[..., None]) * scale[..., None]
    layer = load_quantized(tmp_path / "a").get_submodule(name)
    assert np.abs(layer.dequantize(torch.float64).numpy() - weight.reshape(64, 128)).max() == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefer", ["speed", "memory", "plain"])
def test_quantized_embeddings_and_head(make_llama, tmp_path, tied, prefer):
    spec = QuantSpec(4, 32, embeddings=True, head=True)
    model = quantize(make_llama(tied=tied), spec)
    folder = save_quantized(model, tmp_path / "a", spec)
    assert ("lm_head.codes" in load_file(folder / FILES[0])) != tied
    loaded = load_quantized(folder, prefer=prefer)
    assert isinstance(loaded.model.embed_tokens, QuantEmbedding)
    assert loaded.lm_head.shared is (loaded.model.embed_tokens if tied else None)
    again = save_quantized(loaded, tmp_path / "b", spec)
    for name in FILES:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name
    assert_same_model(model, load_quantized(again, prefer="plain"))


def test_mixed_bits_and_layers_left_in_16_bits(make_llama, tmp_path):
    spec = QuantSpec(4, 32)
    layers = {
        "*.down_proj": QuantSpec(8, "channel", "int8-dynamic"),
        "*.1.*.q_proj": QuantSpec(2, 16, "rtn"),
        "*.v_proj": None,
    }
    model = quantize(make_llama(), spec, layers)
    folder = save_quantized(model, tmp_path / "a", spec)
    described = read_description(folder)["layers"]
    assert "model.layers.0.self_attn.v_proj" not in described
    assert described["model.layers.0.mlp.down_proj"]["activations"] == "int8"
    assert described["model.layers.1.self_attn.q_proj"] == {
        "kind": "linear",
        "bits": 2,
        "group_size": 16,
        "rows": 64,
        "columns": 64,
        "bias": False,
        "activations": None,
        "method": "rtn",
    }
    loaded = load_quantized(folder, prefer="plain")
    assert_same_model(model, loaded)
    assert loaded.model.layers[0].mlp.down_proj.activations == "int8"
    again = save_quantized(loaded, tmp_path / "b", spec)
    assert (again / "quant.json").read_bytes() == (folder / "quant.json").read_bytes()


def test_transposed_layers_of_gpt2(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    spec = QuantSpec(4, 32)
    quantize(model, spec)
    folder = save_quantized(model, tmp_path / "a", spec)
    entry = read_description(folder)["layers"]["transformer.h.0.attn.c_attn"]
    assert (entry["rows"], entry["columns"], entry["bias"]) == (192, 64, True)
    assert_same_model(model, load_quantized(folder, prefer="plain"))


def test_a_layer_used_under_two_names_is_one_again(make_llama, tmp_path):
    model = make_llama(mlp_bias=True)
    first, second = model.model.layers
    second.mlp.up_proj = first.mlp.up_proj
    quantize(model, QuantSpec(4, 32))
    folder = save_quantized(model, tmp_path / "a", QuantSpec(4, 32))
    assert not any("layers.1.mlp.up_proj" in name for name in load_file(folder / FILES[0]))
    loaded = load_quantized(folder, prefer="plain")
    assert loaded.model.layers[1].mlp.up_proj is loaded.model.layers[0].mlp.up_proj
    assert_same_model(model, loaded)


@pytest.mark.parametrize("config", [Gemma3TextConfig, Qwen2Config, Qwen3Config])
def test_buffers_that_are_not_stored_are_computed(config, tmp_path):
    """Gemma-3 scales its embeddings by a buffer and has two rotary frequency tables."""
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    model = AutoModelForCausalLM.from_config(config(**settings, **heads)).eval()
    quantize(model, QuantSpec(4, 32))
    loaded = load_quantized(save_quantized(model, tmp_path / "a", QuantSpec(4, 32)), prefer="plain")
    assert_same_model(model, loaded)
    for (name, ours), (other, theirs) in zip(
        model.named_buffers(), loaded.named_buffers(), strict=True
    ):
        assert name == other and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_computed_buffers_in_another_dtype_than_the_architecture_gives(make_llama, tmp_path):
    model = quantize(make_llama(), QuantSpec(4, 32)).to(torch.bfloat16)
    folder = save_quantized(model, tmp_path / "a", QuantSpec(4, 32))
    assert read_description(folder)["computed"]["model.rotary_emb.inv_freq"] == "bfloat16"
    loaded = load_quantized(folder, prefer="plain")
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert_same_model(model, loaded)


def test_tied_16_bit_weights_are_stored_once_and_tied_again(make_llama, tmp_path):
    model = quantize(make_llama(tied=True), QuantSpec(4, 32))
    folder = save_quantized(model, tmp_path / "a", QuantSpec(4, 32))
    stored = load_file(folder / FILES[0])
    assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored
    loaded = load_quantized(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert type(loaded.model.layers[0].mlp.up_proj) is QuantLinear
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_than_bfloat16(make_llama, tmp_path, dtype):
    spec = QuantSpec(6, 32, embeddings=True, head=True)
    model = quantize(make_llama(), spec, dtype=dtype)
    loaded = load_quantized(save_quantized(model, tmp_path / "a", spec), prefer="plain")
    assert loaded.dtype == loaded.config.dtype == dtype
    assert_same_model(model, loaded)


def test_another_process_gets_bit_equal_logits_and_text(make_llama, tmp_path):
    model = make_llama(tied=True, attention_bias=True, rope_parameters=SCALED_ROPE)
    model.model.layers[0].self_attn.q_proj.bias.copy_(torch.randn(64))
    quantize(model, QuantSpec(3, 32))
    save_quantized(model, tmp_path / "model", QuantSpec(3, 32), {"note": "kept"})
    program = (
        "import sys, torch\n"
        "from quant.artifact import load_quantized\n"
        "torch.set_num_threads(1)\n"
        "model = load_quantized(sys.argv[1], prefer='plain')\n"
        "ids = torch.load(sys.argv[2])\n"
        "text = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)\n"
        "torch.save((model(ids).logits, text), sys.argv[3])\n"
    )
    torch.save(IDS, tmp_path / "ids.pt")
    paths = [str(tmp_path / name) for name in ("model", "ids.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", program, *paths], cwd=ROOT, check=True, timeout=120)
    logits, text = torch.load(tmp_path / "out.pt")
    assert torch.equal(logits, model(IDS).logits)
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(text, expected)
    assert read_description(tmp_path / "model")["meta"] == {"note": "kept"}


def test_kernels_neither_change_the_file_nor_its_bytes(make_llama, tmp_path):
    """Whatever layout a layer works on, `stored` is what is saved and counted."""
    spec = QuantSpec(4, 32, embeddings=True, head=True)
    plain = save_quantized(quantize(make_llama(tied=True), spec), tmp_path / "plain", spec)
    for prefer in ("speed", "memory"):
        loaded = load_quantized(plain, prefer=prefer)
        assert true_bytes(loaded) == read_description(plain)["bytes"]
        again = save_quantized(loaded, tmp_path / prefer, spec)
        for name in FILES:
            assert (plain / name).read_bytes() == (again / name).read_bytes(), name


def test_saving_what_was_loaded_over_itself_changes_nothing(make_llama, tmp_path):
    """The loaded model lies in the very file that is replaced."""
    spec = QuantSpec(5, 16)
    folder = save_quantized(quantize(make_llama(), spec), tmp_path / "a", spec, {"note": 1})
    before = {name: (folder / name).read_bytes() for name in FILES}
    loaded = load_quantized(folder)
    loaded.save_pretrained(folder)
    after = {name: (folder / name).read_bytes() for name in FILES}
    assert after.pop("quant.json") == before.pop("quant.json").replace(b'{\n  "note": 1\n }', b"{}")
    assert after == before
    loaded(IDS)


def test_a_loaded_model_is_copied_and_pickled_without_its_file(make_llama, tmp_path):
    spec = QuantSpec(4, 32)
    model = quantize(make_llama(), spec)
    loaded = load_quantized(save_quantized(model, tmp_path / "a", spec), prefer="plain")
    assert_same_model(model, copy.deepcopy(loaded))
    torch.save(loaded, tmp_path / "whole.pt")
    assert (tmp_path / "whole.pt").stat().st_size < 3 * true_bytes(model)
    assert_same_model(model, torch.load(tmp_path / "whole.pt", weights_only=False))


def test_loading_leaves_the_random_state_and_the_config_alone(make_llama, tmp_path):
    model = make_llama()
    model.config.architectures = ["LlamaForCausalLM"]
    quantize(model, QuantSpec(4, 32))
    folder = save_quantized(model, tmp_path / "a", QuantSpec(4, 32))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loaded = load_quantized(folder)
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()


def test_a_stock_from_pretrained_fails_rather_than_load_random_weights(make_llama, tmp_path):
    model = quantize(make_llama(), QuantSpec(4, 32))
    folder = save_quantized(model, tmp_path / "a", QuantSpec(4, 32))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


class OwnLlama(LlamaForCausalLM):
    """An architecture that transformers does not know by the config."""


def test_what_cannot_be_saved_is_refused(make_llama, tmp_path):
    spec = QuantSpec(4, 32)
    with pytest.raises(ValueError, match="holds no quantized layer"):
        save_quantized(make_llama(), tmp_path / "a", spec)
    model = quantize(make_llama(), spec)
    for meta in ({"set": {1}}, {"nan": float("nan")}, {"large": "x" * (9 << 20)}):
        with pytest.raises(ValueError, match="meta (must|takes)"):
            save_quantized(model, tmp_path / "a", spec, meta)
    with pytest.raises(ValueError, match="a OwnLlama could not be loaded again: .* LlamaForCausal"):
        save_quantized(quantize(OwnLlama(model.config), spec), tmp_path / "a", spec)
    model.generation_config.max_new_tokens = -3
    with pytest.raises(ValueError, match="^model.generation_config cannot be saved: .*max_new_tok"):
        save_quantized(model, tmp_path / "a", spec)
    model.generation_config.max_new_tokens = None
    model.model.layers[1].mlp.up_proj.scale[3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"up_proj: 1 values of its scale are not finite"):
        save_quantized(model, tmp_path / "a", spec)
    assert not list(tmp_path.iterdir())


def test_the_description_says_what_the_folder_holds(make_llama, tmp_path):
    model = quantize(make_llama(tied=True), QuantSpec(3, 32), dtype=torch.bfloat16)
    folder = save_quantized(model, tmp_path / "a", QuantSpec(3, 32), {"run": ["x", 1, None]})
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert model.config.architectures is None  # saving does not touch the model
    found = read_description(folder)
    assert found == json.loads((folder / "quant.json").read_text())
    assert found["format"] == FORMAT == 2 and found["dtype"] == "bfloat16"
    assert found["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert found["meta"] == {"run": ["x", 1, None]}
    assert set(found["computed"]) == {
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    }
