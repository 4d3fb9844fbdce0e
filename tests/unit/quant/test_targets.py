"""Which weights of which families are quantized, and what is refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from quant.quant_spec import CHANNEL, QuantSpec
from quant.quantize import check_group_size
from quant.targets import find_targets
from tests.fixtures.model_families import tiny

FOUR = QuantSpec(4, 32)
BOTH = QuantSpec(4, 32, embeddings=True, head=True)
EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "gpt_oss"]
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def refusal(model: PreTrainedModel, spec: QuantSpec = FOUR, layers: dict | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        find_targets(model, spec, layers)
    line = str(caught.value)
    assert "\n" not in line
    return line


def last_parts(names) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


# -- ordinary models ---------------------------------------------------------------------------


def test_llama_every_linear_layer_but_the_head():
    targets = find_targets(tiny("llama", "meta"), FOUR)
    assert len(targets.layers) == 14
    assert last_parts(targets.layers) == ATTENTION | {"gate_proj", "up_proj", "down_proj"}
    assert {target.kind for target in targets.layers.values()} == {"linear"}
    assert targets.kept == {"model.embed_tokens": "embeddings=False", "lm_head": "head=False"}


def test_llama_embeddings_and_head_each_alone_when_untied():
    model = tiny("llama", "meta")
    table = find_targets(model, QuantSpec(4, 32, embeddings=True)).layers
    assert table["model.embed_tokens"].kind == "embedding" and "lm_head" not in table
    head = find_targets(model, QuantSpec(4, 32, head=True)).layers
    assert head["lm_head"].kind == "linear" and "model.embed_tokens" not in head
    assert len(find_targets(model, BOTH).layers) == 16


@pytest.mark.parametrize(("flag", "other"), [("embeddings", "head"), ("head", "embeddings")])
def test_one_of_two_tied_ends_is_refused_with_both_names(flag, other):
    line = refusal(tiny("qwen3", "meta"), QuantSpec(4, 32, **{flag: True}))
    assert line.startswith(f"{flag} without {other}: Qwen3ForCausalLM ties its head lm_head")
    assert "model.embed_tokens" in line and line.endswith("ask for both or none")


def test_tied_ends_are_one_weight():
    targets = find_targets(tiny("qwen3", "meta"), BOTH).layers
    tied = targets["model.embed_tokens"]
    assert (tied.kind, tied.head_names, tied.weights) == ("tied", ("lm_head",), 256 * 64)
    assert len(targets) == 15


def test_ends_that_share_memory_but_not_the_parameter_are_tied_too():
    model = tiny("llama")
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    assert "embeddings without head" in refusal(model, QuantSpec(4, 32, embeddings=True))


def test_gpt2_holds_its_weights_transposed():
    targets = find_targets(tiny("gpt2", "meta"), FOUR)
    assert {target.kind for target in targets.layers.values()} == {"conv1d"}
    up = targets.layers["transformer.h.0.mlp.c_fc"]
    assert (up.rows, up.columns) == (256, 64)
    down = targets.layers["transformer.h.0.mlp.c_proj"]
    assert (down.rows, down.columns) == (64, 256)


def test_gpt2_positions_are_no_embeddings():
    targets = find_targets(tiny("gpt2", "meta"), BOTH)
    assert targets.layers["transformer.wte"].kind == "tied"
    assert not any("wpe" in name for name in targets.layers)


def test_a_module_under_two_names_is_one_target():
    model = tiny("llama", "meta")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    found = find_targets(model, FOUR).layers
    assert len(found) == 11
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    assert found[names[0]].names == names


def test_two_layers_with_one_weight_are_one_target():
    model = tiny("llama", "meta")
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    found = find_targets(model, FOUR).layers
    assert found["model.layers.0.mlp.up_proj"].names[1] == "model.layers.1.mlp.up_proj"


# -- what cannot be quantized ------------------------------------------------------------------


@pytest.mark.parametrize("family", EXPERTS)
def test_fused_experts_are_refused_by_name_with_their_share(family):
    model = tiny(family, "meta")
    line = refusal(model)
    fused = [p.numel() for p in model.parameters() if p.dim() == 3]
    fused += [p.numel() for n, p in model.named_parameters() if n.endswith("proj_bias")]  # gpt-oss
    percent = 100 * sum(fused) / sum(p.numel() for p in model.parameters())
    assert f"{percent:.1f} % of all" in line and "Experts" in line
    first = next(n for n, p in model.named_parameters() if p.dim() == 3)
    assert f"{first} {list(model.get_parameter(first).shape)}" in line
    assert line.endswith("layers={'*.experts': None}")


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_stay_in_16_bits_when_listed_and_routers_always(family):
    targets = find_targets(tiny(family, "meta"), FOUR, {"*.experts*": None})
    wanted = set(ATTENTION)
    if family == "qwen2_moe":  # a shared expert beside the others, and its gate of one row
        wanted |= {"gate_proj", "up_proj", "down_proj"}
        assert targets.kept["model.layers.0.mlp.shared_expert_gate"] == "router"
    assert last_parts(targets.layers) == wanted
    routers = {name for name, why in targets.kept.items() if why == "router"}
    assert {"model.layers.0.mlp.gate"} <= routers or {"model.layers.0.mlp.router"} <= routers
    assert targets.kept["model.layers.0.mlp.experts.gate_up_proj"] == "listed as None"


def test_the_way_out_that_a_refusal_names_works():
    for family in (*EXPERTS, "mamba", "gemma3"):
        model = tiny(family, "meta")
        listed = re.search(r"layers=(\{.*\})$", refusal(model))
        assert listed is not None
        assert find_targets(model, QuantSpec(4, 8), eval(listed[1])).layers


def test_linear_layers_of_a_kind_of_their_own_are_refused():
    line = refusal(tiny("falcon", "meta"))
    assert "transformer.h.0.self_attention.query_key_value.weight [96, 64]" in line
    assert "FalconLinear" in line and "'*.query_key_value': None" in line
    model = tiny("llama", "meta", vocab_size=8192)

    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Same(nn.Linear):
        pass

    # One small layer of many: no share is too small for a forward that would be lost.
    model.model.layers[0].self_attn.k_proj = Doubling(64, 32, device="meta")
    model.model.layers[1].self_attn.k_proj = Same(64, 32, device="meta")
    assert "model.layers.0.self_attn.k_proj.weight [32, 64] of Doubling" in refusal(model)
    targets = find_targets(model, FOUR, {"model.layers.0.self_attn.k_proj": None})
    assert "model.layers.1.self_attn.k_proj" in targets.layers and len(targets.layers) == 13


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("flags", [("embeddings",), ("head",), ("embeddings", "head")])
def test_scaled_embeddings_are_refused_by_class_and_name(family, flags):
    model = tiny(family, "meta")
    line = refusal(model, QuantSpec(4, 32, **dict.fromkeys(flags, True)))
    kind = type(model.get_input_embeddings()).__name__
    assert (
        "Scaled" in kind
        and f"model.embed_tokens is of class {kind}, tied to its head lm_head" in line
    )
    assert len(find_targets(model, FOUR).layers) == 14


def test_a_table_that_renormalizes_itself_is_refused():
    model = tiny("llama", "meta")
    model.model.embed_tokens = nn.Embedding(256, 64, max_norm=1.0, device="meta")
    assert "is of class Embedding with max_norm 1.0" in refusal(model, BOTH)


def test_towers_of_other_modalities_stay_as_they_are():
    targets = find_targets(tiny("gemma3", "meta"), FOUR, {"*.multi_modal_projector": None})
    assert not any("vision" in name for name in targets.layers)
    assert targets.kept["model.vision_tower"] == "tower of another modality"
    assert len(targets.layers) == 14


def test_small_convolutions_do_not_make_a_model_unquantizable():
    model = tiny("mamba", "meta")
    assert "A_log" in refusal(model)  # 6 % of a tiny model, 0.2 % of a real one
    big = tiny("mamba", "meta", hidden_size=1024)
    kept = find_targets(big, FOUR).kept
    assert kept["backbone.layers.0.mixer.A_log"] == "few"
    assert kept["backbone.layers.0.mixer.conv1d.weight"] == "few"


def test_a_model_without_a_layer_to_quantize():
    assert "LlamaForCausalLM has no layer besides" in refusal(
        tiny("llama", "meta"), FOUR, {"*": None}
    )


# -- layers with a spec of their own -----------------------------------------------------------


def test_the_first_entry_that_matches_counts():
    mlp, last = QuantSpec(2, 64), QuantSpec(8, CHANNEL, "rtn")
    layers = {"model.layers.1.mlp.down_proj": last, "*.mlp": mlp, "*.layers.0.*.v_proj": None}
    targets = find_targets(tiny("llama", "meta"), FOUR, layers)
    chosen = {name: target.spec for name, target in targets.layers.items()}
    assert chosen["model.layers.1.mlp.down_proj"] == last
    assert chosen["model.layers.0.mlp.down_proj"] == chosen["model.layers.1.mlp.up_proj"] == mlp
    assert chosen["model.layers.0.self_attn.q_proj"] == FOUR
    assert targets.kept["model.layers.0.self_attn.v_proj"] == "listed as None"
    assert "model.layers.1.self_attn.v_proj" in chosen and len(chosen) == 13


def test_a_tied_weight_answers_to_both_names():
    model = tiny("qwen3", "meta")
    eight = QuantSpec(8, 64)
    for name in ("lm_head", "model.embed_tokens"):
        assert find_targets(model, BOTH, {name: eight}).layers["model.embed_tokens"].spec == eight
        assert len(find_targets(model, BOTH, {name: None}).layers) == 14


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"model.layers.0.mlp.upp_proj": None}, ["matches no layer", "model.layers.0.mlp.up_proj"]),
        (
            {"*.attention.*": FOUR},
            ["layers['*.attention.*']: matches no layer; there are for example"],
        ),
        ({"lm_head": FOUR}, ["lm_head is not quantized (head=False); may only be left so"]),
        ({"*": 4}, ["layers['*']: is 4; may be a QuantSpec, or None"]),
        ({3: None}, ["layers[3]: is None"]),
        ({"*.down_proj": QuantSpec(4, 48)}, ["group_size 48 does not do", "down_proj", "128"]),
    ],
)
def test_wrong_entries_of_layers(layers, words):
    line = refusal(tiny("llama", "meta"), FOUR, layers)
    assert all(word in line for word in words), line


def test_experts_get_no_spec_of_their_own():
    line = refusal(tiny("mixtral", "meta"), FOUR, {"*.experts": QuantSpec(2, 32)})
    assert (
        "experts.gate_up_proj is not quantized (cannot be quantized); may only be left so" in line
    )


# -- group sizes -------------------------------------------------------------------------------


def test_group_sizes_are_checked_from_a_config_without_weights():
    # 80 billion weights: only possible on the meta device
    big = LlamaConfig(
        hidden_size=8192, intermediate_size=28000, num_hidden_layers=80, num_attention_heads=64
    )
    check_group_size(big, [8, 32, CHANNEL])
    with pytest.raises(ValueError) as caught:
        check_group_size(big, [32, 64])
    line = str(caught.value)
    assert "\n" not in line
    assert "group_size 64" in line and "layers.0.mlp.down_proj" in line and "28000" in line
    assert line.endswith("may be 8, 16, 32 or channel")


@pytest.mark.parametrize("size", [0, 4, -8, 12])
def test_a_size_that_is_none_is_told_with_those_that_are(size):
    with pytest.raises(
        ValueError, match=f"group_size {size} does not do.*8, 16, 32, 64 or channel"
    ):
        check_group_size(tiny("llama", "meta"), [size])


def test_embeddings_and_head_are_checked_when_asked_for():
    model = tiny("llama", "meta")
    model.lm_head = nn.Linear(72, 256, device="meta")
    check_group_size(model, [64])
    with pytest.raises(ValueError, match=r"group_size 64 .* layer lm_head, which is 72"):
        check_group_size(model, [64], head=True)
    with pytest.raises(ValueError, match="without embeddings"):
        check_group_size(tiny("gpt2", "meta"), [64], head=True)


def test_a_width_that_cannot_be_packed_is_named():
    odd = LlamaConfig(
        hidden_size=64, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4
    )
    for size in (4, CHANNEL):
        with pytest.raises(ValueError, match=r"down_proj is 100 weights wide.*no group size does"):
            check_group_size(odd, [size])
    with torch.device("meta"):
        model = tiny("llama", "meta", intermediate_size=100)
    assert len(find_targets(model, FOUR, {"*.down_proj": None}).layers) == 12
