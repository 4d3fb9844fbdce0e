"""The rules of `auto`, and how well activations are estimated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.resolve_auto import (
    activation_bytes,
    auto_activation_checkpointing,
    auto_batch_tokens,
    auto_learning_rate,
    auto_micro_batch,
    layer_weights,
)

MEASURED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 352},
    "qwen3": {"hidden_size": 128, "intermediate_size": 384, "head_dim": 64},
    "phi3": {"hidden_size": 128, "intermediate_size": 352, "pad_token_id": 0},
    "gemma3_text": {"hidden_size": 128, "intermediate_size": 768, "head_dim": 32},
    "gpt2": {"n_embd": 128, "n_head": 4},
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", MEASURED)
def test_activations_are_what_autograd_keeps(kind, lora) -> None:
    config = config_of(kind, 1)
    kept = (saved_bytes(kind, 3, lora) - saved_bytes(kind, 1, lora)) / 2
    assert 0.6 < activation_bytes(config) / kept < 1.4


def config_of(kind: str, layers: int) -> dict[str, Any]:
    heads = {} if kind == "gpt2" else {"num_attention_heads": 4, "num_key_value_heads": 2}
    name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    return {**MEASURED[kind], **heads, name: layers}


def saved_bytes(kind: str, layers: int, lora: bool) -> float:
    """Bytes per token that a forward pass in bfloat16 leaves for the backward pass."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.models.lora import add_adapters
    from trainer.spec.sections import LoraSpec

    config = AutoConfig.for_model(kind, vocab_size=64, **config_of(kind, layers))
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    if lora:
        add_adapters(model, LoraSpec(), 0)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(64, (1, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.base_model(input_ids=ids, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(size for size, _ in kept.values()) / 128


def test_activations_are_recomputed_where_they_are_large() -> None:
    small = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    large = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
    assert not auto_activation_checkpointing(small, 16384, False)
    assert auto_activation_checkpointing(large, 16384, False)
    assert auto_activation_checkpointing({"text_config": large}, 16384, True)
    assert not auto_activation_checkpointing(large, 2048, False)
    tokens = (12 << 30) // activation_bytes(large)  # between the limits of the two
    assert auto_activation_checkpointing(large, tokens, False)
    assert not auto_activation_checkpointing(large, tokens, True)


@pytest.mark.parametrize(
    "init, lora, width, rate",
    [
        ("pretrained", False, 1024, 2e-5),
        ("pretrained", True, 1024, 2e-4),
        ("slice", False, 4096, 1e-4),
        ("slice", True, 4096, 2e-4),
        ("random", False, 768, 1e-3),
        ("random", False, 3072, 5e-4),
        ("random", False, 32, 3e-3),
    ],
)
def test_learning_rates(init, lora, width, rate) -> None:
    assert auto_learning_rate(init, width, lora) == pytest.approx(rate)


@pytest.mark.parametrize("length, expected", [(2048, 8), (8192, 2), (16385, 1), (100000, 1)])
def test_a_micro_batch_holds_at_least_one_sequence(length, expected) -> None:
    assert auto_micro_batch(length, {"hidden_size": 4096}, "cuda") == expected


def test_a_micro_batch_is_seconds_of_a_cpu() -> None:
    small = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4}  # the demo's
    assert auto_micro_batch(256, small, "cpu") == auto_micro_batch(256, small, "cuda") == 64
    large = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    assert auto_micro_batch(512, large, "cpu") == 1 and auto_micro_batch(512, large, "cuda") == 32
    assert auto_micro_batch(64, large, "cpu") == 8
    assert layer_weights({"text_config": large}) == 30 * 576 * (4 * 576 + 3 * 1536)


def test_a_teachers_block_is_seconds_of_a_cpu() -> None:
    assert auto_batch_tokens(70_000_000_000, "cuda") == 16384
    assert auto_batch_tokens(3_662_080, "cpu") == 16384  # the demo's
    for parameters in (10_000_000, 50_000_000):
        seconds = 2 * parameters * auto_batch_tokens(parameters, "cpu") / 50e9
        assert 1 < seconds < 5
    assert auto_batch_tokens(134_515_008, "cpu") == 512  # one sequence of SmolLM2's is 3 s
