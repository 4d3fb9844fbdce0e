"""A token through the C++ op in one call, against the ordinary way through transformers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quant.kernels import use_kernels
from quant.layers.decode import Decoder
from quant.layers.linear import QuantLinear, dense_weights
from quant.quant_spec import QuantSpec
from quant.quantize import quantize

SIZES = {
    "vocab_size": 250,
    "hidden_size": 192,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 600,
    "initializer_range": 0.2,
}
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
SCALED |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FOUR = QuantSpec(4, 32, "rtn")
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, tied, biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "llama, rope scaled": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=SCALED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


def made(name="llama", spec=FOUR, dtype=torch.float32, **more):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases that a wrong place would be seen of
            parameter.data += 0.3 * torch.randn_like(parameter)
    model = quantize(model, spec, **more).to(dtype)
    use_kernels(model)
    return model


def prompt(tokens=9, rows=1):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(1, 250, (rows, tokens), generator=generator)


class Steps(TorchDispatchMode):
    """Counts the calls of the op."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.stillhouse_cpu.decode.default
        return function(*args, **(kwargs or {}))


def ordinary(model):
    """The same model with its class's own forward."""
    other = copy.deepcopy(model)
    other.__class__ = type(model).__mro__[2]
    return other


@torch.no_grad()
def follow(model, ids, steps, cache=None, **more):
    """Logits after the prompt and after each of some given tokens, the cache, and steps counted."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    found = [model(ids, past_key_values=cache).logits[:, -1]]
    with Steps() as counted:
        for token in range(7, 7 + steps):
            step = torch.full((len(ids), 1), token)
            given = {name: value(cache) for name, value in more.items()}
            out = model(input_ids=step, past_key_values=cache, **given)
            found.append(out.logits[:, -1])
    return torch.stack(found), cache, counted.count


def apart(found, expected):
    return float((found - expected).float().norm() / expected.float().norm())


@pytest.mark.parametrize("spec", [FOUR, QuantSpec(8, 32, "rtn")])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_cache_are_those_of_the_ordinary_way(name, spec):
    model = made(name, spec)
    plain = ordinary(model)
    found, cache, count = follow(model, prompt(), 6)
    expected, other, none = follow(plain, prompt(), 6)
    assert (count, none) == (6, 0)
    with dense_weights(plain, torch.float32):
        dense, _, _ = follow(plain, prompt(), 6)
    # Float32 sums in another order may turn a rounding of an activation over, no more.
    assert apart(found, expected) < 0.3 * apart(expected, dense) + 1e-5
    assert cache.get_seq_length() == other.get_seq_length() == 15
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape == (1, 2, 15, 32)
        assert apart(mine.keys, theirs.keys) < 0.01 and apart(mine.values, theirs.values) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_get_logits_in_their_dtype(dtype):
    model = made("qwen3", dtype=dtype)
    found, cache, count = follow(model, prompt(), 4)
    expected, _, _ = follow(ordinary(model), prompt(), 4)
    assert count == 4 and found.dtype == dtype == cache.layers[0].keys.dtype
    assert apart(found, expected) < 0.05


def test_bits_per_layer_dense_layers_and_a_quantized_head():
    spec = QuantSpec(4, 32, "rtn", embeddings=True, head=True)
    layers = {"model.layers.0.*": None, "*.o_proj": QuantSpec(8, 64, "rtn")}
    layers |= {"*.1.self_attn.k_proj": QuantSpec(2, 96, "rtn")}
    for name in ("llama", "llama, tied, biases"):
        model = made(name, spec, layers=layers)
        found, _, count = follow(model, prompt(), 3)
        expected, _, _ = follow(ordinary(model), prompt(), 3)
        assert count == 3 and apart(found, expected) < 0.01


def test_a_head_in_float32_is_read_as_bfloat16_only_where_it_is_one():
    for exact in (True, False):
        model = made()
        held = model.lm_head.weight.data
        model.lm_head.weight.data = held.bfloat16().float() if exact else held * 1.001
        found, _, _ = follow(model, prompt(), 3)
        expected, _, _ = follow(ordinary(model), prompt(), 3)
        held = model.base_model._decoder.weights[-3]
        assert held.dtype == (torch.bfloat16 if exact else torch.float32)
        assert apart(found, expected) < 0.005


def test_generates_the_ordinary_ways_tokens():
    model = made("qwen3", QuantSpec(8, 32, "rtn"))
    given = {"attention_mask": torch.ones(1, 9), "do_sample": False, "eos_token_id": None}
    with Steps() as counted:
        found = model.generate(prompt(), max_new_tokens=300, **given)  # past the first buffer
    assert counted.count == 299
    for at in (10, 150, 300):
        scores = ordinary(model)(found[:, :at]).logits[0, -1]
        assert scores[found[0, at]] > scores.max() - 0.05 * scores.std()


def test_the_two_ways_take_turns_on_one_cache():
    model = made()
    ids = prompt(20)
    expected = ordinary(model)(ids).logits[0, -1]
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), Steps() as counted:
        model(ids[:, :5], past_key_values=cache)
        model(input_ids=ids[:, 5:6], past_key_values=cache)
        model(input_ids=ids[:, 6:10], past_key_values=cache)
        for at in range(10, 15):
            model(input_ids=ids[:, at : at + 1], past_key_values=cache)
        cache.crop(-3)  # and other tokens after it than were there
        fork = copy.deepcopy(cache)
        model(input_ids=ids[:, 0:1], past_key_values=fork)
        for at in range(12, 20):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=cache)
    assert counted.count == 1 + 5 + 1 + 8
    assert apart(out.logits[0, -1], expected) < 0.02


def test_what_it_does_not_do_takes_the_ordinary_way():
    model = made()
    plain = ordinary(model)

    def padded(cache):
        mask = torch.ones(1, cache.get_seq_length() + 1)
        mask[0, 0] = 0
        return mask

    for ids, more in (
        (prompt(rows=2), {}),
        (prompt(), {"attention_mask": padded}),
        (prompt(), {"output_hidden_states": lambda cache: True}),
        (prompt(), {"logits_to_keep": lambda cache: torch.tensor([0])}),
    ):
        found, _, count = follow(model, ids, 2, **more)
        expected, _, _ = follow(plain, ids, 2, **more)
        assert count == 0 and torch.equal(found, expected)
    given = {"max_new_tokens": 4, "attention_mask": torch.ones(1, 9), "do_sample": False}
    with Steps() as counted:
        model.generate(prompt(), cache_implementation="static", **given)
    assert counted.count == 0
    with Steps() as counted:
        cache = DynamicCache(config=model.config)
        model(prompt(), past_key_values=cache)
        model(input_ids=prompt(1), past_key_values=cache)  # gradients may be asked for
    assert counted.count == 0


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), "sliding windows"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")), "activation"),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)), "architecture"),
    ],
)
def test_other_models_are_left_alone(model, why):
    torch.manual_seed(0)
    model = quantize(model().eval(), QuantSpec(4, 32, "rtn"))
    use_kernels(model)
    expected, _, _ = follow(ordinary(model), prompt(), 3)
    found, _, count = follow(model, prompt(), 3)
    assert count == 0 and torch.equal(found, expected)
    if type(model).__name__ != "Gemma2ForCausalLM":  # whose cache is another one
        assert why in model.base_model._decoder.reason


def test_changes_of_the_model_are_seen():
    model = made()
    layer = model.model.layers[1]

    def check(count):
        expected, _, _ = follow(ordinary(model), prompt(), 2)
        found, _, counted = follow(model, prompt(), 2)
        assert counted == count and apart(found, expected) < 0.01
        return found

    first = check(2)
    with torch.no_grad():
        layer.input_layernorm.weight.mul_(2)
    second = check(2)
    layer.post_attention_layernorm.weight = nn.Parameter(torch.rand(192))
    third = check(2)
    layer.mlp.gate_proj.set_codes(layer.mlp.up_proj.unpacked())
    fourth = check(2)
    assert all(apart(a, b) > 0.02 for a, b in ((first, second), (second, third), (third, fourth)))
    seen = []
    hook = layer.mlp.register_forward_hook(lambda *_: seen.append(1))
    follow(model, prompt(), 2)
    assert len(seen) == 3
    hook.remove()
    check(2)
    use_kernels(model, "plain")
    check(0)
    use_kernels(model)
    with dense_weights(model, torch.float32):
        assert follow(model, prompt(), 2)[2] == 0
    check(2)


def test_a_model_that_has_decoded_can_be_copied_and_pickled():
    model = made()
    found, _, _ = follow(model, prompt(), 2)
    assert isinstance(model.base_model._decoder, Decoder)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again, _, count = follow(other, prompt(), 2)
        assert count == 2 and torch.equal(again, found)
    assert len([m for m in model.modules() if isinstance(m, QuantLinear)]) == 21
