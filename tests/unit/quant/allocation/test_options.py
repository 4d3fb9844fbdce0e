"""Options of each layer: their bytes are those of the file that is really written."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from quant.allocation import candidates, layer_options, uniform_bytes
from quant.artifact import load_quantized, save_quantized
from quant.artifact.sizes import true_bits_per_weight, true_bytes
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from tests.fixtures.model_families import tiny
from trainer.models.load import meta_model

CHOICES = [(8, 32), (4, 64), (3, 32), (3, "channel"), (2, 16), (1, 8)]
CASES = [
    ("llama", {}, (False, False), ()),
    ("llama", {}, (True, False), ()),
    ("llama", {}, (True, True), ()),
    ("llama", {"tie_word_embeddings": True}, (True, True), ()),
    ("qwen3", {}, (False, False), ("model.layers.0.mlp", "*.q_proj")),
    ("gpt2", {}, (False, False), ()),
    ("gpt2", {}, (True, True), ("*.c_attn",)),
    ("mixtral", {}, (False, False), ("*.experts*",)),
    ("gemma2", {}, (False, False), ()),
]


@pytest.mark.parametrize(("family", "changes", "ends", "kept"), CASES)
def test_bytes_are_those_of_the_quantized_model(family, changes, ends, kept):
    base = QuantSpec(4, 64, "rtn", *ends)
    options = layer_options(meta_model(tiny(family, **changes).config), base, CHOICES, kept)
    assert options == layer_options(tiny(family, **changes), base, CHOICES, kept)
    draw = random.Random(0)
    for _ in range(3):
        chosen = {name: draw.choice(each) for name, each in options.layers.items()}
        layers = {name: option.spec for name, option in chosen.items()}
        assert options.of(layers) == chosen
        model = quantize(
            tiny(family, **changes), base, {**layers, **dict.fromkeys(kept)}, torch.bfloat16
        )
        assert true_bytes(model) == options.total(chosen)
    largest = {name: each[-1] for name, each in options.layers.items()}
    dense = tiny(family, **changes).to(torch.bfloat16)
    assert options.sixteen_bit == options.total(largest) == true_bytes(dense)


@pytest.mark.parametrize(("family", "changes", "ends", "kept"), CASES)
def test_bytes_of_a_uniform_model(family, changes, ends, kept):
    spec = QuantSpec(3, 32, "rtn", *ends)
    expected = uniform_bytes(tiny(family, **changes).config, spec, kept)
    model = quantize(tiny(family, **changes), spec, dict.fromkeys(kept), torch.bfloat16)
    assert true_bytes(model) == expected


def test_an_allocated_model_is_saved_and_loaded_like_any_other(make_llama, tmp_path):
    base = QuantSpec(2, 32, "hqq", True, True)
    options = layer_options(make_llama(tied=True), base, [(4, 32), (3, 64), (2, 64)])
    losses = {
        (name, option.key): 1.0 / option.bytes
        for name, each in options.layers.items()
        for option in each
        if option.spec is not None
    }
    budget = (options.smallest + options.sixteen_bit) // 2
    found = candidates(options, losses, budget)[0]
    assert len(set(found.layers.values())) > 1, "nothing was mixed"
    model = quantize(make_llama(tied=True), base, found.layers, torch.bfloat16)
    assert true_bytes(model) == found.bytes <= budget
    save_quantized(model, tmp_path / "model", base)
    loaded = load_quantized(tmp_path / "model", prefer="plain")
    assert true_bytes(loaded) == found.bytes
    assert true_bits_per_weight(loaded) == true_bits_per_weight(model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_choices_that_do_not_fit_a_layer_are_left_out(make_llama):
    model = make_llama(intermediate_size=96)  # down_proj is 96 wide, all others 64
    options = layer_options(model, QuantSpec(4, 64), [(4, 64), (4, 32), (4, "channel"), (2, 48)])
    keys = {name.rpartition(".")[2]: [o.key for o in each] for name, each in options.layers.items()}
    assert keys["down_proj"] == ["2b-g48", "4b-channel", "4b-g32", "16b"]
    assert keys["up_proj"] == ["4b-g64", "4b-g32", "16b"], "a row of 64 is a group of 64"


def test_what_is_chosen_keeps_the_base_s_method_and_ends(make_llama):
    base = QuantSpec(8, 64, "rtn", embeddings=True)
    options = layer_options(make_llama(), base, [(3, 32)])
    assert "model.embed_tokens" in options.layers and "lm_head" not in options.layers
    assert {each[0].spec for each in options.layers.values()} == {
        QuantSpec(3, 32, "rtn", embeddings=True)
    }


def test_faults_are_one_line(make_llama):
    model = make_llama()
    with pytest.raises(ValueError, match="choices is empty"):
        layer_options(model, QuantSpec(4, 64), [])
    with pytest.raises(ValueError, match="int8-dynamic has one width"):
        layer_options(model, QuantSpec(8, "channel", "int8-dynamic"), [(8, "channel")])
    with pytest.raises(ValueError, match=r"group_size 48 does not do for layer"):
        uniform_bytes(model, QuantSpec(4, 48))
    options = layer_options(model, QuantSpec(4, 64), [(4, 64)])
    with pytest.raises(ValueError, match=r"q_proj has no spec; may be one of 4b-g64, 16b"):
        options.of({})
    with pytest.raises(ValueError, match=r"has no option QuantSpec\(bits=3.*may be 4b-g64, 16b"):
        options.of(dict.fromkeys(options.layers, QuantSpec(3, 64)))


def test_a_weight_that_another_module_holds_too_is_refused(make_llama):
    model = make_llama()
    shared = model.model.layers[0].self_attn.k_proj
    other = nn.Linear(64, 32)  # with a bias: a layer of its own, of the same weight
    other.weight = shared.weight
    model.model.layers[1].self_attn.k_proj = other
    with pytest.raises(ValueError, match="shares its weight with model.layers.*k_proj: its bytes"):
        layer_options(model, QuantSpec(4, 64), [(4, 64)])
    assert layer_options(model, QuantSpec(4, 64), [(4, 64)], ["*.k_proj"]).fixed_bytes
