"""What a spec lays over DeepSpeed's configuration."""

from __future__ import annotations

import pytest

from trainer.spec.sections import DistillSpec
from trainer.training.engine import training_config
from trainer.training.overlay import OWNED, REFUSED, Overlay, overlay_faults


def spec(**changes) -> DistillSpec:
    values = {"steps": 100, "learning_rate": 1e-3, "warmup_ratio": 0.1, "schedule": "cosine"}
    return DistillSpec(**{**values, **changes})


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
