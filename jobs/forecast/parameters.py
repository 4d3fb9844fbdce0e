"""Sizes and weights of a model, counted from its config.json by plain arithmetic.

What a family has is in a table: biases, norms, experts, and what transformers takes for keys that a
config leaves out. Families that are not in it are counted from a model on the meta device, which
costs the seconds of importing transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
# Defaults as in transformers 5; `tests/unit/jobs/forecast/test_parameters.py` counts every family
# twice.
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


@dataclass(frozen=True)
class Matrix:
    """Linear layers `[rows, columns]` (outputs, inputs), as many as `count`, all in the layers."""

    name: str
    rows: int
    columns: int
    count: int

    @property
    def weights(self) -> int:
        """Weights of one."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model.

    parameters: all weights, tied ones once. active: those that a token meets (of a mixture of
    experts it meets a few experts only), the embeddings' rows aside unless the head has them too.
    largest: elements of the largest piece that ZeRO-3 gathers at once, as
    `trainer.teacher.sharded.largest_layer`. heads_width: elements of all queries of a token. inner:
    of the MLP's states that a token meets. matrices: linear layers that a sweep quantizes; experts
    stay in 16 bits. raw: the config's text part.
    """

    kind: str
    parameters: int
    active: int
    largest: int
    layers: int
    hidden: int
    inner: int
    heads: int
    heads_width: int
    vocab: int
    positions: int | None
    tied: bool
    experts: bool
    matrices: tuple[Matrix, ...]
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.vocab * self.hidden

    def forward_flops(self, length: int) -> float:
        """Operations of a forward pass per token of a sequence of `length` tokens.

        Two for every weight that is met, and for attention four per element of the queries and
        position that is seen, half of them on average (Kaplan et al., 2020, Scaling Laws for Neural
        Language Models, section 2.1; Chowdhery et al., 2022, PaLM, appendix B).
        """
        return 2.0 * self.active + 4.0 * self.layers * self.heads_width * length / 2

    def adapters(self, rank: int, targets: Any) -> int:  # noqa: ANN401
        """Parameters of LoRA adapters of this rank on `targets` ("auto": all linear layers)."""
        return sum(
            rank * (matrix.rows + matrix.columns) * matrix.count
            for matrix in self.matrices
            if targets == "auto" or matrix.name in targets
        )


def shape_of(raw: Mapping[str, Any], vocab: int | None = None) -> Shape:
    """The shape of a config.json, or of a config written in a spec.

    vocab: rows of the embeddings where the config does not say. Raises ValueError, one line, for a
    config of which no model can be made.
    """
    text = dict(raw.get("text_config") or raw)
    if vocab is not None:
        text.setdefault("vocab_size", vocab)
    kind = str(text.get("model_type"))
    family = FAMILIES.get(kind)
    if family is None or "quantization_config" in raw:
        return _from_model(text, kind)
    sizes = {
        **family.defaults,
        **{name: value for name, value in text.items() if value is not None},
    }
    try:
        return _counted(kind, family, sizes, text)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"config.json of a {kind} cannot be used: {error}") from None


def _counted(kind: str, family: Family, sizes: Mapping[str, Any], text: dict[str, Any]) -> Shape:
    hidden, layers = int(sizes["hidden_size"]), int(sizes["num_hidden_layers"])
    heads = int(sizes["num_attention_heads"])
    kv_heads = int(sizes["num_key_value_heads"] or heads)
    width = int(sizes["head_dim"] or hidden // heads)
    vocab, tied = int(sizes["vocab_size"]), bool(sizes["tie_word_embeddings"])
    queries, keys = heads * width, kv_heads * width
    attention = _attention(family, hidden, queries, keys)
    inner = int(sizes["intermediate_size"])
    dense = _mlp(family, hidden, inner)
    has = {
        name: _says(sizes, getattr(family, name)) for name in ("qkv_bias", "out_bias", "mlp_bias")
    }
    vectors = family.norms * hidden
    vectors += has["qkv_bias"] * (queries + 2 * keys) + has["out_bias"] * hidden
    vectors += {"": 0, "head": 2 * width, "full": queries + keys}[family.qk_norm]
    mlp_vectors = has["mlp_bias"] * (2 * inner + hidden)
    sparse = _sparse_layers(family, sizes, layers)
    matrices = [Matrix(*one, layers) for one in attention]
    matrices += [Matrix(*one, layers - sparse) for one in dense if layers > sparse]
    block = sum(rows * columns for _, rows, columns in attention) + vectors
    dense_block = block + sum(rows * columns for _, rows, columns in dense) + mlp_vectors
    blocks = active = (layers - sparse) * dense_block
    largest, met = dense_block, inner
    if sparse:
        count, chosen = int(sizes[family.experts]), int(sizes["num_experts_per_tok"])
        expert_inner = int(sizes[family.expert_inner])
        expert, router = 3 * hidden * expert_inner, hidden * count
        more = 0
        if family.shared:
            shared = int(sizes["shared_expert_intermediate_size"])
            more = 3 * hidden * shared + hidden
            matrices += [Matrix(*one, sparse) for one in _mlp(family, hidden, shared)]
            matrices.append(Matrix("shared_expert_gate", 1, hidden, sparse))
            met = shared
        blocks += sparse * (block + router + more + count * expert)
        active += sparse * (block + router + more + chosen * expert)
        largest = block + router + more + count * expert
        met = (met if family.shared else 0) + chosen * expert_inner
    table = vocab * hidden
    return Shape(
        kind=kind,
        parameters=blocks + hidden + table * (1 if tied else 2),
        active=active + hidden + table,
        largest=max(largest, table + hidden),
        layers=layers,
        hidden=hidden,
        inner=met,
        heads=heads,
        heads_width=queries,
        vocab=vocab,
        positions=int(sizes["max_position_embeddings"] or 0) or None,
        tied=tied,
        experts=bool(sparse),
        matrices=tuple(matrices),
        raw=text,
    )


def _says(sizes: Mapping[str, Any], key: bool | str) -> bool:
    return bool(sizes.get(key)) if isinstance(key, str) else key


def _attention(family: Family, hidden: int, queries: int, keys: int) -> list[tuple[str, int, int]]:
    if family.fused:
        return [("qkv_proj", queries + 2 * keys, hidden), ("o_proj", hidden, queries)]
    return [
        ("q_proj", queries, hidden),
        ("k_proj", keys, hidden),
        ("v_proj", keys, hidden),
        ("o_proj", hidden, queries),
    ]


def _mlp(family: Family, hidden: int, inner: int) -> list[tuple[str, int, int]]:
    if family.fused:
        return [("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)]
    return [
        ("gate_proj", inner, hidden),
        ("up_proj", inner, hidden),
        ("down_proj", hidden, inner),
    ]


def _sparse_layers(family: Family, sizes: Mapping[str, Any], layers: int) -> int:
    """How many layers have experts: every `decoder_sparse_step`-th that is not listed as dense."""
    if not family.experts or not int(sizes[family.experts]):
        return 0
    step, dense = int(sizes.get("decoder_sparse_step") or 1), sizes.get("mlp_only_layers") or []
    return sum((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def _from_model(text: dict[str, Any], kind: str) -> Shape:
    """Counted from transformers' own model, without memory."""
    import json
    import tempfile
    from pathlib import Path

    from trainer.models.load import count_parameters, meta_model, read_config
    from trainer.teacher.sharded import largest_layer

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(text))
        config = read_config(Path(folder))
    try:
        model = meta_model(config)
    except Exception as error:  # transformers raises many kinds for sizes that do not fit
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"no {kind} can be built from its config.json ({reason})") from None
    sizes = config.get_text_config()
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings()
    tied = head is not None and head.weight is table.weight
    experts = {
        name: value.numel() for name, value in model.named_parameters() if ".experts." in name
    }
    total = count_parameters(model)
    count = next(
        (int(n) for key in ("num_local_experts", "num_experts", "n_routed_experts")
         if (n := getattr(sizes, key, None))), 1,
    )  # fmt: skip
    chosen = int(getattr(sizes, "num_experts_per_tok", None) or count)
    idle = round(sum(experts.values()) * (1 - chosen / count))
    heads = int(getattr(sizes, "num_attention_heads", 1))
    width = int(getattr(sizes, "head_dim", None) or sizes.hidden_size // heads)
    inner = getattr(sizes, "intermediate_size", None) or getattr(sizes, "n_inner", None)
    return Shape(
        kind=kind,
        parameters=total,
        active=total - idle - (0 if tied else table.weight.numel()),
        largest=largest_layer(model),
        layers=int(getattr(sizes, "num_hidden_layers", 1)),
        hidden=sizes.hidden_size,
        inner=int(inner or 4 * sizes.hidden_size) * (chosen if experts else 1),
        heads=heads,
        heads_width=heads * width,
        vocab=sizes.vocab_size,
        positions=getattr(sizes, "max_position_embeddings", None),
        tied=tied,
        experts=bool(experts),
        matrices=_matrices(model, head),
        raw=text,
    )


def _matrices(model: PreTrainedModel, head: Any) -> tuple[Matrix, ...]:  # noqa: ANN401
    from collections import Counter

    from torch import nn
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, weights transposed

    found: Counter[tuple[str, int, int]] = Counter()
    for name, module in model.named_modules():
        if module is head or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        rows, columns = module.weight.shape
        if isinstance(module, Conv1D):
            rows, columns = columns, rows
        found[name.rpartition(".")[2], rows, columns] += 1
    return tuple(Matrix(*key, count) for key, count in found.items())
