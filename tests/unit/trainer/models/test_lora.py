"""Adapters: where they go, what they compute, how they are merged and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.models.load import meta_model
from trainer.models.lora import (
    add_adapters,
    is_adapter,
    linear_layers,
    load_adapters,
    lora_faults,
    merged_state,
)
from trainer.spec.sections import LoraSpec, StudentSpec

SIZES = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "tie_word_embeddings": True},
    "phi": LLAMA,  # its layers have biases
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
}
LINEAR = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
}


def config_of(kind: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **SIZES, **KINDS[kind])


def make(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config_of(kind)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def leaves(names: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def train(model: Any) -> dict[str, torch.Tensor]:
    """As after a training: B is not zero any more."""
    torch.manual_seed(5)
    return {
        name: torch.randn_like(parameter) * 0.3
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_auto_is_every_linear_layer_but_the_head(kind) -> None:
    model = make(kind)
    names = [name for name, _ in model.named_parameters()]
    assert leaves(linear_layers(meta_model(config_of(kind)))) == LINEAR[kind]
    add_adapters(model, LoraSpec(r=3), 0)
    targets = model.peft_config["default"].target_modules
    assert set(targets) == LINEAR[kind]
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert all(is_adapter(name) for name in trained)
    assert len(trained) == 2 * len(linear_layers(make(kind)))
    kept = [name for name, _ in model.named_parameters() if not is_adapter(name)]
    assert [name.replace(".base_layer.", ".") for name in kept] == names
    assert type(model) is type(make(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_adapters_change_nothing(kind) -> None:
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        plain = make(kind)(ids).logits
        model = make(kind)
        add_adapters(model, LoraSpec(), 0)
        torch.testing.assert_close(model(ids).logits, plain, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_w_plus_alpha_over_r_b_a(kind) -> None:
    """In float64 from the definition; GPT-2's linear layers hold the transposed weight."""
    plain = dict(make(kind).named_parameters())
    model = make(kind)
    add_adapters(model, LoraSpec(r=3, alpha=7.5), 0)
    adapters = train(model)
    merged = merged_state(model, adapters)
    assert set(merged) == set(plain)
    changed = 0
    for name, value in merged.items():
        owner = name.removesuffix(".weight")
        a = adapters.get(f"{owner}.lora_A.default.weight")
        expected = plain[name].detach().double()
        if a is not None:
            b = adapters[f"{owner}.lora_B.default.weight"]
            delta = 7.5 / 3 * (b.double() @ a.double())
            expected = expected + (delta.T if kind == "gpt2" else delta)
            changed += 1
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)
    assert changed == len(adapters) // 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_what_the_adapted_one_does(kind) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(12).view(2, 6)
    model = make(kind)
    add_adapters(model, LoraSpec(r=3, targets="auto"), 0)
    adapters = train(model)
    load_adapters(model, adapters)
    with torch.no_grad():
        expected = model(ids).logits
        plain = AutoModelForCausalLM.from_config(config_of(kind)).eval()
        plain.load_state_dict(merged_state(model, adapters), strict=False)
        plain.tie_weights()
        torch.testing.assert_close(plain(ids).logits, expected, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(make(kind)(ids).logits, expected, atol=0.1)


def test_weights_are_merged_in_float32_and_rounded_once() -> None:
    model = make("llama", torch.bfloat16)
    base = {name: value.detach().float() for name, value in model.named_parameters()}
    add_adapters(model, LoraSpec(r=3, alpha=3), 0)
    adapters = train(model)
    assert {value.dtype for value in adapters.values()} == {torch.bfloat16}
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapters[f"{name}.lora_{x}.default.weight"].float() for x in "AB")
    found = merged_state(model, adapters)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert torch.equal(found[f"{name}.weight"], (base[f"{name}.weight"] + b @ a).bfloat16())


def test_adapters_are_drawn_by_the_seed_alone() -> None:
    def drawn(seed: int, before: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        model = make("llama", dtype)
        torch.manual_seed(before)
        add_adapters(model, LoraSpec(r=2), seed)
        return {name: p.detach() for name, p in model.named_parameters() if is_adapter(name)}

    first, again, other = drawn(7, 1), drawn(7, 2), drawn(8, 1)
    low = drawn(7, 3, torch.bfloat16)
    for name, value in first.items():
        assert torch.equal(value, again[name]) and torch.equal(value.bfloat16(), low[name])
        assert torch.equal(value, other[name]) == (".lora_B." in name)


def test_targets_are_ends_of_names() -> None:
    model = make("llama")
    targets = ["layers.1.self_attn.q_proj", "down_proj"]
    add_adapters(model, LoraSpec(targets=targets, dropout=0.2), 0)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if is_adapter(name)}
    assert adapted == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert set(model.peft_config["default"].target_modules) == set(targets)
    with pytest.raises(ValueError, match="names no linear layer"):
        add_adapters(make("llama"), LoraSpec(targets=["proj"]), 0)


@pytest.mark.parametrize(
    "kind, target, what",
    [
        ("llama", "query", "no layer"),
        ("llama", "proj", "no layer"),  # an end of a name is whole words
        ("llama", "mlp", "no layer"),
        ("llama", "lm_head", "the output head or the embeddings"),
        ("llama", "embed_tokens", "the output head or the embeddings"),
        ("gpt2", "q_proj", "no layer"),
        ("gpt2", "wte", "the output head or the embeddings"),
        ("phi", "lm_head", "the output head or the embeddings"),
    ],
)
def test_targets_that_get_no_adapter_are_refused(kind, target, what) -> None:
    good = sorted(LINEAR[kind])[0]
    student = StudentSpec(model="x/y", lora=LoraSpec(targets=[good, target]))
    (fault,) = lora_faults(student, config_of(kind))
    assert fault == (
        f"student.lora.targets: got {target!r}, which is {what} of a {kind}; may be auto or a list "
        f"of its linear layers: {', '.join(sorted(LINEAR[kind]))}"
    )
    for lora in (None, LoraSpec(), LoraSpec(targets=[good])):
        assert lora_faults(StudentSpec(model="x/y", lora=lora), config_of(kind)) == []


def test_adapters_of_another_model_are_refused() -> None:
    model = make("llama")
    add_adapters(model, LoraSpec(targets=["q_proj"]), 0)
    adapters = train(model)
    adapters.pop(next(iter(adapters)))
    with pytest.raises(ValueError, match="adapters do not fit the model"):
        load_adapters(model, adapters)
