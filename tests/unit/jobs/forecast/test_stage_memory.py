"""Memory by part: a cell's against the sweep's own forecast, the teacher's by its sharding."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.errors import SpecErrors
from jobs.forecast import training_memory
from jobs.forecast.forecast import forecast
from jobs.forecast.models import read_models
from jobs.forecast.parameters import shape_of
from jobs.forecast.place import Place, cluster_place, named_place
from jobs.forecast.stage_memory import cell_bytes, cell_need, swept
from jobs.spec.load import spec_of
from quant.quant_spec import QuantSpec
from tests.fixtures.forecast_models import LLAMA_8B, folder_of, plan_of, spec_data

SMALL = {**LLAMA_8B, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("sweep", [{}, {"recover": {"steps": 5, "bits": [4]}}, {"head": True}])
def test_a_cell_takes_what_the_sweep_itself_foretells(tmp_path, cuda, sweep) -> None:
    from transformers import AutoConfig

    from quant.evaluation.memory import cell_memory

    data = spec_data(tmp_path, data__sequence_length=256)
    data["student"] = {"model": folder_of(SMALL, tmp_path / "small")}
    data["sweep"] = {"bits": [4], "group_size": [64], **sweep}
    data["resources"] = {"sweep": {"gpus_per_cell": int(cuda)}}
    spec = spec_of(data)
    place = named_place("h100", 1, None) if cuda else cluster_place([(4, 0)], None, 64e9)
    key, need = cell_need(read_models(spec), spec, place)
    recovered = "recover" in sweep
    assert key.endswith("-recovered") == recovered
    own = cell_memory(
        AutoConfig.for_model(**SMALL),
        QuantSpec(4, 64, head="head" in sweep),
        spec.sweep.batch_sequences,
        256,
        cuda=cuda,
        training=recovered,
    )
    parts = {name: size for name, size in own.parts.items() if name != "process"}
    assert need.device == pytest.approx(parts)


@pytest.mark.parametrize("bits, size", [(8, 64), (3, 128), (4, "channel")])
def test_bytes_of_a_cell_are_those_of_its_file(bits, size) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from quant.artifact.sizes import true_bytes
    from quant.quantize import quantize

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL), dtype=torch.bfloat16)
    spec = QuantSpec(bits, size, "rtn")
    quantize(model, spec)
    assert cell_bytes(shape_of(SMALL), spec) == pytest.approx(true_bytes(model), rel=1e-3)


def test_the_teacher_is_whole_or_shared_out(tmp_path) -> None:
    def capture(root: str, **changes: Any) -> dict[str, Any]:
        return plan_of(tmp_path / root, **changes)["stages"]["capture"]

    whole = capture("a", teacher__sharding="none")
    assert whole["memory"]["device"]["teacher weights"] == 2 * 70_553_706_496
    assert whole["memory"]["fits"] is False
    shared = capture("b", teacher__sharding="zero3")
    assert shared["workers_per_copy"] == 8 and not shared["across_nodes"]  # a copy on each node
    assert shared["memory"]["device"]["teacher weights, share"] == 2 * 70_553_706_496 / 8
    assert shared["memory"]["fits"] is True
    auto = capture("c", teacher__sharding="auto", gpu="b200")
    assert auto["sharding"] == "zero3"  # 141 GB are over 60 % of 193
    wide = capture("d", teacher__sharding="auto", gpu="l4", gpus=16)
    assert wide["workers_per_copy"] == 16 and wide["across_nodes"]
    none = capture("e", teacher__sharding="auto", gpu="l4", gpus=4)
    assert none["memory"] is None and "do not fit 4 workers" in none["why_not"]


def test_what_makes_training_smaller(tmp_path) -> None:
    roots = iter("abcdefghij")

    def device(**changes: Any) -> dict[str, float]:
        found = plan_of(tmp_path / next(roots), **changes)["stages"]["distill"]["memory"]
        return {**found["device"], "all": found["total"], "host": found["host_total"]}

    plain = device(distill__activation_checkpointing=False)
    recomputed = device()
    assert recomputed["activations"] < plain["activations"] / 5
    assert device(distill__micro_batch=1)["activations"] == recomputed["activations"] / 4
    assert device(distill__zero_stage=1)["all"] > recomputed["all"]
    assert device(distill__zero_stage=3)["weights"] == recomputed["weights"] / 16
    offloaded = device(distill__offload="cpu")
    assert "optimizer and master weights" not in offloaded
    assert offloaded["host"] > 16 * 8.03e9 / 16 * 8 * 0.99
    lora = device(student__lora={"r": 16})
    assert lora["optimizer and master weights"] < recomputed["all"] / 100
    online = device(distill__mode="online", distill__tokens_per_step=65536)
    assert online["teacher weights, share"] == 2 * 70_553_706_496 / 8


def test_adapters_are_counted_as_peft_makes_them() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.models.lora import add_adapters
    from trainer.spec.sections import LoraSpec

    for targets in ("auto", ["q_proj", "down_proj"]):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL))
        add_adapters(model, LoraSpec(r=4, targets=targets), 0)
        made = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert shape_of(SMALL).adapters(4, targets) == made


def test_sizes_are_those_of_the_code_that_works_with_them() -> None:
    """Copied here, as a plan must not wait for torch."""
    from jobs.forecast import stage_memory
    from trainer.losses import fused_linear
    from trainer.teacher import forward, sharded
    from trainer.training import evaluation, loader

    assert (training_memory.CPU_CHUNK, training_memory.GPU_CHUNK) == (
        fused_linear.CPU_CHUNK,
        fused_linear.GPU_CHUNK,
    )
    assert (training_memory.CPU_TILE, training_memory.GPU_TILE) == (
        fused_linear.CPU_TILE,
        fused_linear.GPU_TILE,
    )
    assert (stage_memory.CPU_TILE, stage_memory.GPU_TILE) == (
        forward.CPU_TILE,
        forward.GPU_TILE,
    )
    assert (training_memory.AHEAD_BYTES, training_memory.AHEAD_STEPS) == (
        loader.AHEAD_BYTES,
        loader.AHEAD_STEPS,
    )
    assert training_memory.KEPT_BYTES == evaluation.KEPT_BYTES
    assert stage_memory.CHUNK_TOKENS == forward.CHUNK_TOKENS
    assert stage_memory.PREFETCH == sharded.PREFETCH


def test_workers_fill_one_node_after_the_other() -> None:
    place = Place(((8, 2), (8, 4)), None, None)
    spec = spec_of({"name": "a", "student": {"model": "m"}, "data": {"train": [{"source": "a/b"}]},
                    "distill": {"losses": {"ce": 1}}})  # fmt: skip
    group = place.group("distill", spec)
    assert place.ranks(group) == [[0, 1], [2, 3, 4, 5]] and place.workers_per_node(group) == 4


def test_of_a_mixture_of_experts_all_weights_are_held_and_few_are_met(tmp_path) -> None:
    mixture = {
        **LLAMA_8B, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    data = spec_data(tmp_path)
    data["teacher"] = {"model": folder_of(mixture, tmp_path / "mixture"), "sharding": "none"}
    plan = forecast(spec_of(data), named_place("h200", 8, None))
    model = plan["models"]["teacher"]
    assert model["experts"] and model["parameters"] > 3 * model["active_parameters"]
    weights = plan["stages"]["capture"]["memory"]["device"]["teacher weights"]
    assert weights == 2 * model["parameters"]


def test_of_the_sweep_only_what_it_names(tmp_path) -> None:
    spec = spec_of(spec_data(tmp_path, sweep__models=["teacher"]))
    assert list(swept(read_models(spec), spec)) == ["teacher"]
    with pytest.raises(SpecErrors, match="resources.sweep: a cell of 1 CPUs and 9 GPUs"):
        forecast(
            spec_of(spec_data(tmp_path / "b", resources__sweep={"gpus_per_cell": 9})),
            named_place("h200", 8, None),
        )
