from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen2Config

from quant.artifact import load_quantized, read_description, save_quantized
from quant.linear import QuantLinear
from quant.quantize import quantize
from quant.spec import QuantSpec

ROOT = Path(__file__).parents[3]
IDS = torch.arange(40).reshape(2, 20) * 5 % 256
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("tied", [True, False])
def test_another_process_gets_bit_equal_logits_and_text(make_llama, tmp_path, tied):
    model = make_llama(tied=tied, attention_bias=True, rope_parameters=SCALED_ROPE)
    model.model.layers[0].self_attn.q_proj.bias.copy_(torch.randn(64))
    quantize(model, QuantSpec(3, 32))
    save_quantized(model, tmp_path, QuantSpec(3, 32), {"note": "kept"})
    program = (
        "import sys, torch\n"
        "from quant.artifact import load_quantized\n"
        "torch.set_num_threads(1)\n"
        "model = load_quantized(sys.argv[1])\n"
        "ids = torch.load(sys.argv[2])\n"
        "text = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)\n"
        "torch.save((model(ids).logits, text), sys.argv[3])\n"
    )
    torch.save(IDS, tmp_path / "ids.pt")
    arguments = [str(tmp_path), str(tmp_path / "ids.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, check=True, timeout=120)
    logits, text = torch.load(tmp_path / "out.pt")
    assert torch.equal(logits, model(IDS).logits)
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(text, expected)
    assert read_description(tmp_path)["meta"] == {"note": "kept"}
    assert read_description(tmp_path)["spec"] == QuantSpec(3, 32).to_dict()


@pytest.mark.parametrize("config", [Gemma3TextConfig, Qwen2Config])
def test_buffers_that_are_not_stored_are_computed(config, tmp_path):
    """Gemma-3 scales its embeddings by a buffer and has two rotary frequency tables."""
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    model = AutoModelForCausalLM.from_config(config(**settings, **heads)).eval()
    quantize(model, QuantSpec(4, 32))
    save_quantized(model, tmp_path, QuantSpec(4, 32))
    loaded = load_quantized(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    for (name, ours), (other, theirs) in zip(
        model.named_buffers(), loaded.named_buffers(), strict=True
    ):
        assert name == other and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_tied_weights_are_stored_once_and_tied_again(make_llama, tmp_path):
    model = quantize(make_llama(tied=True), QuantSpec(4, 32))
    save_quantized(model, tmp_path, QuantSpec(4, 32))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("lm_head.weight" in names) != ("model.embed_tokens.weight" in names)
    loaded = load_quantized(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert type(loaded.model.layers[0].mlp.up_proj) is QuantLinear


def test_saving_what_was_loaded_changes_nothing(make_llama, tmp_path):
    model = quantize(make_llama(tied=True), QuantSpec(5, 16))
    first = save_quantized(model, tmp_path / "a", QuantSpec(5, 16))
    second = save_quantized(load_quantized(first), tmp_path / "b", QuantSpec(5, 16))
    for name in ("model.safetensors", "quant.json", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_refuses_what_it_cannot_read(make_llama, tmp_path):
    with pytest.raises(ValueError, match="holds no quantized layer"):
        save_quantized(make_llama(), tmp_path, QuantSpec(4, 32))
    with pytest.raises(ValueError, match=r"no quantized model: it has no quant\.json"):
        load_quantized(tmp_path)
    save_quantized(quantize(make_llama(), QuantSpec(4, 32)), tmp_path, QuantSpec(4, 32))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.zero"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"the first is model\.layers\.0\.mlp\.up_proj\.zero"):
        load_quantized(tmp_path)
    description = json.loads((tmp_path / "quant.json").read_text())
    for version in (2, None):
        (tmp_path / "quant.json").write_text(json.dumps({**description, "format": version}))
        with pytest.raises(ValueError, match=f"has format {version}, this program reads format 1"):
            load_quantized(tmp_path)
