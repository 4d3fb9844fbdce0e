"""Learning rates, parameter groups and DeepSpeed's configuration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trainer.spec.sections import DistillSpec
from trainer.training.engine import (
    OWNED,
    REFUSED,
    Overlay,
    learning_rate,
    make_optimizer,
    overlay_faults,
    training_config,
)


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


# What a spec lays over it.

GOOD = {
    "zero_optimization": {"reduce_bucket_size": 1e6, "overlap_comm": False},
    "wall_clock_breakdown": True,
    "comms_logger": {"enabled": True, "verbose": False},
    "flops_profiler": {"enabled": True, "profile_step": 2},
    "steps_per_print": 1e3,
}


def test_a_setting_is_laid_over_ours() -> None:
    made = training_config(spec(zero_stage=3, deepspeed=GOOD), 2, 1, 1)
    assert made["zero_optimization"] == {
        "stage": 3, "reduce_bucket_size": 1e6, "overlap_comm": False,
    }  # fmt: skip
    assert made["wall_clock_breakdown"] is True and made["train_batch_size"] == 2
    assert overlay_faults(spec(deepspeed=GOOD)) == []
    assert overlay_faults(spec()) == []


@pytest.mark.parametrize("path", OWNED)
def test_what_another_key_says_is_refused_with_its_name(path) -> None:
    section, _, key = path.partition(".")
    overlay = {section: {key: 1}} if key else {section: 1}
    (fault,) = overlay_faults(spec(deepspeed=overlay))
    assert fault == f"distill.deepspeed.{path}: may not be given; {OWNED[path]} says it"


@pytest.mark.parametrize("path", REFUSED)
def test_what_changes_the_training_is_refused(path) -> None:
    section, _, key = path.partition(".")
    overlay = {section: {key: True}} if key else {section: 2}
    (fault,) = overlay_faults(spec(deepspeed=overlay))
    assert fault == f"distill.deepspeed.{path}: may not be given; {REFUSED[path]}"


@pytest.mark.parametrize(
    "overlay, message",
    [
        ({"reduce_bucket_size": 5}, "reduce_bucket_size: unknown key; may be zero_optimization, "),
        ({"elasticity": {"enabled": True}}, "elasticity: unknown key; may be zero_optimization, "),
        ({"zero_optimization": {"foo": 5}}, "zero_optimization.foo: unknown key; may be contig"),
        (
            {"zero_optimization": {"reduce_bucket_sise": 5}},
            "zero_optimization.reduce_bucket_sise: unknown key; did you mean "
            "distill.deepspeed.zero_optimization.reduce_bucket_size?",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "much"}},
            "zero_optimization.reduce_bucket_size: Input should be a valid integer",
        ),
        ({"zero_optimization": 3}, "zero_optimization: got 3; may be a section"),
        ({"flops_profiler": True}, "flops_profiler: got true; may be a section (enabled, "),
        (
            {"flops_profiler": {"enabled": True, "profile_stap": 3}},
            "flops_profiler.profile_stap: unknown key; did you mean "
            "distill.deepspeed.flops_profiler.profile_step?",
        ),
        ({"steps_per_print": "abc"}, 'steps_per_print: got "abc"; may be a whole number from 1'),
        ({"steps_per_print": 0}, "steps_per_print: got 0; may be a whole number from 1"),
        ({"dump_state": 7}, "dump_state: got 7; may be true or false"),
    ],
)
def test_what_deepspeed_would_skip_or_not_take_is_one_line(overlay, message) -> None:
    (fault,) = overlay_faults(spec(deepspeed=overlay))
    assert fault.startswith(f"distill.deepspeed.{message}") and "\n" not in fault


def test_a_key_that_is_no_text_is_one_line() -> None:
    assert overlay_faults(spec(deepspeed={"zero_optimization": {5: 1}})) == [
        "distill.deepspeed.zero_optimization: has the key 5, which is no text; "
        "keys of DeepSpeed are"
    ]


def test_all_that_may_be_given_is_read_by_deepspeed() -> None:
    """A key that DeepSpeed dropped would be accepted and ignored."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.config import DeepSpeedConfig

    own = Overlay()
    assert set(type(own.comms_logger).model_fields) == set(CommsLoggerConfig.model_fields)
    assert own.flops_profiler.model_dump() == vars(DeepSpeedFlopsProfilerConfig({}))
    read = vars(DeepSpeedConfig(training_config(spec(), 1, 1, 1)))
    names = {"zero_optimization": "zero_config", "comms_logger": "comms_config"}
    names["flops_profiler"] = "flops_profiler_config"
    assert {names.get(key, key) for key in Overlay.model_fields} <= set(read)
