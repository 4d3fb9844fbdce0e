"""What of a model a plan needs to know: its sizes, and how many weights are where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.plan.families import FAMILIES, Family


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

    def adapters(self, rank: int, targets: Any) -> int:
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
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
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


def _matrices(model: Any, head: Any) -> tuple[Matrix, ...]:
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
