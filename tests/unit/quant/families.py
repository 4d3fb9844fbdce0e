"""Tiny models of several families, for the tests of what is quantized."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
}
ATTENTION = {"head_dim": 16, "layer_types": ["full_attention"] * 2}
FAMILIES: dict[str, dict] = {
    "llama": {**SIZES, "tie_word_embeddings": False},
    "qwen3": {**SIZES, "head_dim": 16, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 128},
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen2_moe": {
        **SIZES,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {
        **SIZES,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "phimoe": {**SIZES, "num_local_experts": 4},
    "gpt_oss": {**SIZES, **ATTENTION, "num_local_experts": 4},
    "gemma2": {**SIZES, "head_dim": 16},
    "gemma3_text": {**SIZES, **ATTENTION},
    "gemma3": {
        "text_config": {**SIZES, **ATTENTION},
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    },
    "falcon": SIZES,
    "mamba": {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 256},
}


def tiny(family: str, device: str = "cpu", **changes) -> PreTrainedModel:
    """A random model of a family, in evaluation mode; on "meta" without weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False)
