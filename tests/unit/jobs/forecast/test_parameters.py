"""Weights counted from a config alone are those of the model that transformers builds of it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from jobs.forecast.parameters import FAMILIES, shape_of
from trainer.models.load import TEACHERS

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 112,
    "pad_token_id": 0,
}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
# What makes a difference in single families.
MORE: dict[str, list[dict[str, Any]]] = {
    "llama": [{"attention_bias": True, "mlp_bias": True}, {"head_dim": 8}],
    "smollm3": [{"tie_word_embeddings": False}],
    "mixtral": [EXPERTS],
    "qwen2_moe": [EXPERTS, {**EXPERTS, "decoder_sparse_step": 2}],
    "qwen3_moe": [EXPERTS, {**EXPERTS, "mlp_only_layers": [0, 3], "head_dim": 8}],
}
CASES = [
    (kind, {**SMALL, **more})
    for kind in sorted(FAMILIES)
    for more in [EXPERTS if FAMILIES[kind].experts else {}, *MORE.get(kind, [])]
]


@pytest.mark.parametrize("kind, sizes", CASES)
def test_counts_are_those_of_the_model(kind, sizes) -> None:
    found = shape_of({"model_type": kind, **sizes})
    model, config = build(kind, **sizes)
    assert_same(found, model, config)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(kind) -> None:
    sizes = {"pad_token_id": 0}
    assert_same(shape_of({"model_type": kind, **sizes}), *build(kind, **sizes))


def test_other_families_are_counted_from_the_model() -> None:
    assert "olmoe" in TEACHERS - set(FAMILIES)
    sizes = {**SMALL, **EXPERTS}
    found = shape_of({"model_type": "olmoe", **sizes})
    model, config = build("olmoe", **sizes)
    assert_same(found, model, config)
    assert found.experts
    gpt2 = shape_of({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4})
    assert_same(gpt2, *build("gpt2", n_embd=64, n_layer=2, n_head=4))


def test_no_model_is_built_for_a_common_family(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trainer.models.load", None)
    llama = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    found = shape_of({"model_type": "llama", **llama, **heads})
    assert found.parameters == 70_553_706_496  # as the model card of Llama 3 70B has it


def test_of_a_mixture_a_token_meets_few_experts() -> None:
    # Mixtral 8x7B: 46.7 billion weights, of which a token uses 12.9 (Jiang et al., 2024).
    found = shape_of({"model_type": "mixtral"})
    assert found.parameters == pytest.approx(46.7e9, rel=0.001)
    assert found.active + found.vocab * found.hidden == pytest.approx(12.9e9, rel=0.005)


def test_operations_are_twice_the_weights_and_what_attention_sees() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **SMALL)  # eager: the counter knows its products
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.zeros((1, 32), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    found = shape_of({"model_type": "llama", **SMALL})
    own = 32 * found.forward_flops(32)
    seen_twice = 32 * 4.0 * found.layers * found.heads_width * 32 / 2  # the counter has no mask
    # Norms are weights too, of which the counter knows nothing.
    assert own + seen_twice == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_config_that_makes_no_model_is_one_line() -> None:
    with pytest.raises(ValueError, match="llama cannot be used") as error:
        shape_of({"model_type": "llama", "hidden_size": "wide"})
    assert "\n" not in str(error.value)


def build(kind: str, **sizes: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), config


def assert_same(found: Any, model: Any, config: Any) -> None:
    from trainer.teacher.sharded import largest_layer

    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.largest == largest_layer(model)
    head = model.get_output_embeddings()
    assert found.tied == (head.weight is model.get_input_embeddings().weight)
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head
    )
    assert sum(matrix.weights * matrix.count for matrix in found.matrices) == linear
    text = config.get_text_config()
    assert (found.vocab, found.hidden) == (text.vocab_size, text.hidden_size)
    assert found.positions == text.max_position_embeddings
