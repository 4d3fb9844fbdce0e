"""Learning rates, parameter groups and DeepSpeed's configuration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trainer.spec.sections import DistillSpec
from trainer.training.engine import learning_rate, make_optimizer, training_config


def spec(**changes) -> DistillSpec:
    values = {"steps": 100, "learning_rate": 1e-3, "warmup_ratio": 0.1, "schedule": "cosine"}
    return DistillSpec(**{**values, **changes})


def rates(**changes) -> list[float]:
    made = spec(**changes)
    return [learning_rate(made, step) for step in range(made.steps)]


def test_warm_up_is_linear_and_never_zero() -> None:
    found = rates()
    assert found[:10] == pytest.approx([1e-3 * n / 11 for n in range(1, 11)])
    assert found[10] == max(found) == pytest.approx(1e-3)


def test_cosine_ends_near_a_tenth() -> None:
    found = rates()
    for step in (10, 40, 99):
        progress = (step - 10) / 90
        expected = 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        assert found[step] == pytest.approx(expected)
    assert found[10:] == sorted(found[10:], reverse=True)
    assert 1e-4 < found[-1] < 1.01e-4


def test_linear_and_constant() -> None:
    found = rates(schedule="linear")
    steps = [a - b for a, b in zip(found[10:], found[11:], strict=False)]
    assert steps == pytest.approx([1e-3 * 0.9 / 90] * 89)
    assert rates(schedule="constant")[10:] == [1e-3] * 90


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_trainings_have_a_rate(steps) -> None:
    for ratio in (0.0, 0.03, 0.9):
        found = rates(steps=steps, warmup_ratio=ratio)
        assert all(0 < rate <= 1e-3 for rate in found)


def test_a_rate_depends_on_the_step_alone() -> None:
    """A resumed training goes on with the rate it would have had."""
    assert learning_rate(spec(), 57) == rates()[57]


def test_weight_decay_is_for_matrices() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    optimizer = make_optimizer(model, spec(weight_decay=0.2, betas=(0.8, 0.9)))
    by_decay = {g["weight_decay"]: g["params"] for g in optimizer.param_groups}
    assert by_decay[0.2] == [model[1].weight]
    assert {id(p) for p in by_decay[0.0]} == {id(p) for p in model.parameters() if p.ndim == 1}
    assert all(g["betas"] == (0.8, 0.9) for g in optimizer.param_groups)


def test_a_model_of_matrices_only_has_one_group() -> None:
    optimizer = make_optimizer(nn.Linear(3, 3, bias=False), spec())
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_training_configuration(stage) -> None:
    made = training_config(spec(zero_stage=stage, dtype="bfloat16", max_grad_norm=0.5), 4, 3, 2)
    assert made["train_batch_size"] == 24
    assert made["zero_optimization"]["stage"] == stage
    assert made["bf16"]["enabled"] and made["data_types"]["grad_accum_dtype"] == "fp32"
    assert made["gradient_clipping"] == 0.5
    assert not training_config(spec(dtype="float32"), 1, 1, 1)["bf16"]["enabled"]


def test_the_optimizer_is_plain_adamw() -> None:
    assert isinstance(make_optimizer(nn.Linear(2, 2), spec()), torch.optim.AdamW)


def test_adapters_are_matrices_too() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from trainer.models.lora import add_adapters
    from trainer.spec.sections import LoraSpec

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11))
    add_adapters(model, LoraSpec(r=2), 0)
    (group,) = make_optimizer(model, spec(weight_decay=0.3)).param_groups
    assert group["weight_decay"] == 0.3 and len(group["params"]) == 2 * 4
    assert all(min(p.shape) == 2 for p in group["params"])


def test_offload_is_of_master_weights_and_optimizer_state() -> None:
    made = training_config(spec(offload="cpu", zero_stage=3), 1, 1, 1)
    zero = made["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu" and "offload_param" not in zero
    assert made["zero_force_ds_cpu_optimizer"] is False  # torch's AdamW needs no compiler
    assert "offload_optimizer" not in training_config(spec(), 1, 1, 1)["zero_optimization"]
