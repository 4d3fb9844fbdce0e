"""Who shares a copy of the teacher, and which teachers can be shared out at all."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.models.lora import add_adapters
from trainer.spec.sections import LoraSpec
from trainer.teacher import placement
from trainer.teacher.placement import groups_for, memory_of, training_bytes
from trainer.teacher.sharded import check_shardable, has_experts, mark_leaves
from trainer.training.signals import adapter_parameters

GB = 1e9
TWO_NODES = [[0, 1, 2, 3], [4, 5, 6, 7]]
EIGHTY = [80 * GB] * 8


@pytest.mark.parametrize(
    ("sharding", "weights", "groups"),
    [
        ("auto", 16 * GB, [[rank] for rank in range(8)]),
        ("none", 500 * GB, [[rank] for rank in range(8)]),
        ("auto", 140 * GB, TWO_NODES),
        ("zero3", 16 * GB, TWO_NODES),
        ("auto", 300 * GB, [list(range(8))]),
        ("zero3", 300 * GB, [list(range(8))]),
    ],
)
def test_a_copy_is_spread_over_as_few_as_hold_it(sharding, weights, groups) -> None:
    assert groups_for(sharding, weights, 2 * GB, EIGHTY, TWO_NODES) == groups


def test_the_smallest_worker_decides() -> None:
    memory = [80 * GB] * 7 + [24 * GB]
    assert groups_for("auto", 16 * GB, GB, memory, TWO_NODES) == TWO_NODES


def test_ranks_of_a_node_need_not_follow_each_other() -> None:
    nodes = [[0, 2], [1, 3]]
    assert groups_for("zero3", GB, GB, [80 * GB] * 4, nodes) == nodes


def test_the_largest_layer_counts_beside_the_share() -> None:
    nodes = [[0, 1], [2, 3]]
    assert groups_for("auto", 80 * GB, 5 * GB, [80 * GB] * 4, nodes) == nodes
    assert groups_for("auto", 80 * GB, 20 * GB, [80 * GB] * 4, nodes) == [[0, 1, 2, 3]]


def test_nodes_of_one_worker_each_share_one_copy_where_sharding_is_asked_for() -> None:
    assert groups_for("zero3", GB, GB, [80 * GB] * 2, [[0], [1]]) == [[0, 1]]


def test_what_fits_nowhere_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"^teacher.model: 900 GB .* 8 workers of 80 GB"):
        groups_for("auto", 900 * GB, 2 * GB, EIGHTY, TWO_NODES)


def test_one_worker_holds_all_of_it_or_refuses() -> None:
    assert groups_for("auto", 16 * GB, 9 * GB, [80 * GB], [[0]]) == [[0]]
    assert groups_for("auto", 79 * GB, 9 * GB, [80 * GB], [[0]]) == [[0]]  # with nobody to share
    assert groups_for("none", 90 * GB, 9 * GB, [80 * GB], [[0]]) == [[0]]
    with pytest.raises(ValueError, match="^teacher.model") as caught:
        groups_for("auto", 90 * GB, 9 * GB, [80 * GB], [[0]])
    assert str(caught.value) == (
        "teacher.model: 90 GB of weights do not fit 1 worker of 80 GB; give resources.capture "
        "more workers"
    )


def test_one_worker_cannot_share() -> None:
    with pytest.raises(ValueError, match="^teacher.sharding: zero3 needs at least 2 workers; set "):
        groups_for("zero3", GB, GB, [80 * GB], [[0]])


def test_a_containers_limit_counts_where_it_is_below_the_machines_memory(
    monkeypatch, tmp_path
) -> None:
    worker = SimpleNamespace(device=torch.device("cpu"), world=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(placement, "LIMITS", (str(tmp_path / "absent"), str(limit)))
    machine = psutil.virtual_memory().total
    for text, memory in (("1000000\n", 1e6), ("max\n", machine), ("9223372036854771712", machine)):
        limit.write_text(text)
        assert memory_of(worker) == memory / 2  # type: ignore[arg-type]


# Mixtures of experts.

MOE = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32}


def test_known_mixtures_of_experts_can_be_sharded() -> None:
    for kind in ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe"):
        config = AutoConfig.for_model(kind, num_hidden_layers=2)
        config.first_k_dense_replace = 1  # of DeepSeek: dense layers before the others
        assert has_experts(config)
        check_shardable(config)


def test_experts_that_are_not_found_are_refused_by_name(monkeypatch) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))

    monkeypatch.setattr("trainer.models.load.meta_model", lambda config: Hidden())
    with pytest.raises(ValueError, match="zero3 does not work for mixtral, a mixture of experts"):
        check_shardable(AutoConfig.for_model("mixtral", **MOE))


def test_models_without_experts_are_not_looked_into(monkeypatch) -> None:
    monkeypatch.setattr("trainer.models.load.meta_model", lambda config: 1 / 0)
    check_shardable(AutoConfig.for_model("llama", **MOE))


def test_a_quantized_checkpoint_is_refused_by_name() -> None:
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="zero3 does not work for a quantized llama"):
        check_shardable(config)


def test_the_module_around_experts_that_are_modules_is_a_leaf() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(2, 4)
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))

    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
    assert mark_leaves(model) == list(model["layers"])


# Beside a student in training.


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    # bfloat16 on 8 ranks: weights 2, gradients 2 + 4, master weights and moments 12.
    [(1, 2 + 6 + 12 / 8), (2, 2 + 18 / 8), (3, 20 / 8)],
)
def test_training_states_are_shared_out_by_stage(stage, bytes_per_parameter) -> None:
    sizes = {"itemsize": 2, "zero_stage": stage, "world": 8, "offloaded": False}
    layer = 2 * 3e7 if stage == 3 else 0  # gathered when it runs
    made = training_bytes(1e9, 1e9, 3e7, **sizes)
    assert made == pytest.approx(1e9 * bytes_per_parameter + layer)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_has_all_training_states(stage) -> None:
    sizes = {"itemsize": 4, "zero_stage": stage, "world": 1, "offloaded": False}
    assert training_bytes(1e9, 1e9, 0, **sizes) == pytest.approx(24e9)


def test_what_is_offloaded_or_does_not_learn_takes_less() -> None:
    def size(trained: float, offloaded: bool) -> float:
        return training_bytes(
            1e9, trained, 0, itemsize=2, zero_stage=2, world=4, offloaded=offloaded
        )

    assert size(1e9, True) == pytest.approx(2e9 + 2e9 / 4)
    assert size(1e6, False) == pytest.approx(2e9 + 18e6 / 4)


def test_a_reserve_is_taken_from_every_worker() -> None:
    def groups(reserve: float) -> list[list[int]]:
        return groups_for("auto", 40 * GB, GB, EIGHTY, TWO_NODES, reserve=reserve)

    assert groups(13 * GB) == [[rank] for rank in range(8)]  # 60 % of 67 GB
    assert groups(14 * GB) == TWO_NODES
    assert groups(61 * GB) == TWO_NODES
    assert groups(70 * GB) == [list(range(8))]
    with pytest.raises(ValueError) as caught:
        groups_for("auto", 40 * GB, GB, EIGHTY, TWO_NODES, stage="distill", reserve=90 * GB)
    assert str(caught.value) == (
        "teacher.model: 40 GB of weights and 1 GB for the largest layer do not fit 8 workers "
        "of 80 GB, of which the student's training takes 90 GB; give resources.distill more "
        "workers"
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_are_counted_as_they_are_made(kind) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
    own = {"n_embd": 32, "n_layer": 3, "n_head": 4} if kind == "gpt2" else sizes
    config = AutoConfig.for_model(kind, vocab_size=64, **own)
    config.num_hidden_layers, config.num_attention_heads = 3, 4
    lora = LoraSpec(r=4)
    model = AutoModelForCausalLM.from_config(config)
    counted = adapter_parameters(model, lora)
    add_adapters(model, lora, seed=0)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
