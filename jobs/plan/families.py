"""The weights of common families, counted from a config.json by plain arithmetic.

What a family has is in a table: biases, norms, experts, and what transformers takes for keys that a
config leaves out. Families that are not in it are counted from a model without memory, which costs
the seconds of importing transformers (`jobs.plan.shape`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How the decoder layers of a family are built.

    qkv_bias, out_bias, mlp_bias: True, False, or the key of the config that says it. norms: weight
    vectors of the width per layer. qk_norm: norms of queries and keys: "" none, "head" one of the
    head's width each, "full" over all heads. fused: queries, keys and values are one matrix, gate
    and up another. experts: the key of their number, expert_inner: that of their width. shared: a
    shared expert with a gate. defaults: of keys that are left out.
    """

    defaults: Mapping[str, Any]
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    norms: int = 2
    qk_norm: str = ""
    fused: bool = False
    experts: str = ""
    expert_inner: str = "moe_intermediate_size"
    shared: bool = False


def _defaults(
    hidden: int, inner: int, layers: int, heads: int, kv: int | None, vocab: int, length: int,
    head_dim: int | None = None, tied: bool = False, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
        **more,
    }


_ATTENTION = "attention_bias"
_LLAMA = _defaults(4096, 11008, 32, 32, None, 32000, 2048)
# Defaults as in transformers 5; `tests/unit/jobs/plan/test_shape.py` counts every family twice.
FAMILIES = {
    "llama": Family(_LLAMA, _ATTENTION, _ATTENTION, "mlp_bias"),
    "granite": Family(_LLAMA, _ATTENTION, _ATTENTION, "mlp_bias"),
    "mistral": Family(_defaults(4096, 14336, 32, 32, 8, 32000, 131072)),
    "qwen2": Family(_defaults(4096, 22016, 32, 32, 32, 151936, 32768), qkv_bias=True),
    "qwen3": Family(
        _defaults(4096, 22016, 32, 32, 32, 151936, 32768, 128),
        _ATTENTION, _ATTENTION, qk_norm="head",
    ),
    "gemma": Family(_defaults(3072, 24576, 28, 16, 16, 256000, 8192, 256, True),
                    _ATTENTION, _ATTENTION),
    "gemma2": Family(_defaults(2304, 9216, 26, 8, 4, 256000, 8192, 256, True),
                     _ATTENTION, _ATTENTION, norms=4),
    "gemma3_text": Family(_defaults(2304, 9216, 26, 8, 4, 262208, 131072, 256, True),
                          _ATTENTION, _ATTENTION, norms=4, qk_norm="head"),
    "phi3": Family(_defaults(3072, 8192, 32, 32, None, 32064, 4096), fused=True),
    "smollm3": Family(_defaults(2048, 11008, 36, 16, 4, 128256, 32768, tied=True),
                      _ATTENTION, _ATTENTION, "mlp_bias"),
    "olmo2": Family(_defaults(4096, 11008, 32, 32, None, 50304, 2048),
                    _ATTENTION, _ATTENTION, qk_norm="full"),
    "mixtral": Family(_defaults(4096, 14336, 32, 32, 8, 32000, 131072,
                                num_local_experts=8, num_experts_per_tok=2),
                      experts="num_local_experts", expert_inner="intermediate_size"),
    "qwen2_moe": Family(_defaults(2048, 5632, 24, 16, 16, 151936, 32768, num_experts=60,
                                  num_experts_per_tok=4, moe_intermediate_size=1408,
                                  shared_expert_intermediate_size=5632, qkv_bias=True),
                        "qkv_bias", experts="num_experts", shared=True),
    "qwen3_moe": Family(_defaults(2048, 6144, 24, 32, 4, 151936, 32768, num_experts=128,
                                  num_experts_per_tok=8, moe_intermediate_size=768),
                        _ATTENTION, _ATTENTION, qk_norm="head", experts="num_experts"),
}  # fmt: skip
