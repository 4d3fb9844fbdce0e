"""Model states against DeepSpeed's own estimators, and against what an engine holds."""

from __future__ import annotations

import os

import pytest

from jobs.forecast.training_memory import states
from trainer.spec.sections import DistillSpec
from trainer.training.engine import training_config

PARAMETERS, LARGEST = 8_030_261_248, 525_340_672  # Llama 3 8B; its embeddings with the last norm
GIB = 1 << 30


@pytest.fixture(scope="module")
def estimators():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    return estimate_zero2_model_states_mem_needs, estimate_zero3_model_states_mem_needs


@pytest.mark.parametrize("gpus, nodes", [(8, 1), (8, 2), (4, 1)])
@pytest.mark.parametrize("offload", [False, True])
def test_stage_2_is_what_deepspeed_estimates(estimators, gpus, nodes, offload) -> None:
    host, device = estimators[0](PARAMETERS, gpus, nodes, offload, additional_buffer_factor=1.0)
    found = states(
        PARAMETERS, PARAMETERS, LARGEST, zero_stage=2, world=gpus * nodes, offload=offload
    )
    assert found.device == pytest.approx(device, rel=0.10)
    if offload and gpus * nodes <= 4:  # above, it counts weights being loaded in float32
        assert found.host * gpus == pytest.approx(host, rel=0.10)


@pytest.mark.parametrize("gpus, nodes", [(8, 1), (8, 2), (4, 1)])
@pytest.mark.parametrize("offload", [False, True])
def test_stage_3_is_what_deepspeed_estimates(estimators, gpus, nodes, offload) -> None:
    host, device, _ = estimators[1](
        PARAMETERS, LARGEST, gpus, nodes, offload, False, additional_buffer_factor=1.0
    )
    found = states(
        PARAMETERS, PARAMETERS, LARGEST, zero_stage=3, world=gpus * nodes, offload=offload
    )
    assert found.device == pytest.approx(device, rel=0.10)
    if offload:
        assert found.host * gpus == pytest.approx(host, rel=0.10)


def test_stage_1_is_the_closed_form_with_gradients_as_the_engine_keeps_them() -> None:
    config = training_config(DistillSpec(zero_stage=1), 1, 1, 8)
    assert config["data_types"]["grad_accum_dtype"] == "fp32"  # the paper's gradients have 2 bytes
    found = states(PARAMETERS, PARAMETERS, LARGEST, zero_stage=1, world=8)
    paper = 4 * PARAMETERS + 12 * PARAMETERS / 8  # Rajbhandari et al., 2020, section 5.1
    assert found.device == pytest.approx(paper + 2 * PARAMETERS, rel=1e-6)


def test_stages_and_workers_share_out_what_they_say() -> None:
    def device(stage: int, world: int, **more: bool) -> float:
        return states(1e10, 1e10, 1e8, zero_stage=stage, world=world, **more).device

    assert device(1, 1) == device(2, 1) == device(3, 1) == 18e10
    assert device(1, 16) > device(2, 16) > device(3, 16)
    assert device(2, 16, offload=True) == 2e10
    # Frozen weights have neither gradients nor an optimizer.
    assert states(1e9, 1e7, 1e8, zero_stage=2, world=1).device == pytest.approx(2e9 + 16e7)
