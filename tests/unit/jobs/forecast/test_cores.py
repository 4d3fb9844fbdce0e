"""Peaks of CPU cores: measured, by kind, and followed by the hours of a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from jobs.forecast import place
from jobs.forecast.forecast import forecast, record
from jobs.forecast.place import (
    BFLOAT16_GAIN,
    FLOAT32_FLOPS,
    Core,
    cluster_place,
    named_place,
    slowest,
    this_core,
)
from jobs.spec.load import load_spec, spec_of
from tests.fixtures import forecast_models, small_job
from trainer.processor import Kind, cpu_dtype, cpu_kind

ROOT = Path(__file__).resolve().parents[4]
AVX2 = Core("avx2", "float32", 100e9, True)
BF16 = Core("avx512_bf16", "bfloat16", 100e9, True)


def demo_teacher(core: Core, *overrides: str) -> dict[str, Any]:
    """The plan of the demo's teacher on two such cores."""
    spec = load_spec("demo-teacher", list(overrides))
    return forecast(spec, cluster_place([(2, 0)], None, 16e9, core))["stages"]["distill"]


def test_a_core_is_measured_on_the_machine_itself() -> None:
    """Between a slow core of today and the widest that there is: far from nothing measured."""
    core = this_core()
    assert core.measured and core.kind == cpu_kind() and core.dtype == cpu_dtype()
    assert 1e9 < core.float32 < 1e12


def test_what_cannot_be_measured_is_taken_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.sys, "executable", "/no/such/python")
    core = this_core()
    assert not core.measured and core.float32 == FLOAT32_FLOPS[cpu_kind()]


def test_every_kind_of_processor_has_a_peak_in_every_dtype() -> None:
    assert set(FLOAT32_FLOPS) == set(BFLOAT16_GAIN) == set(get_args(Kind))
    for kind in get_args(Kind):
        fast = kind in ("avx512_bf16", "amx")
        core = Core(kind, "bfloat16" if fast else "float32", FLOAT32_FLOPS[kind], False)
        assert (core.flops("bfloat16") > core.flops("float32")) == fast, kind
    neon = Core("neon", "bfloat16", 50e9, False)
    assert neon.flops("bfloat16") > neon.flops("float32")


def test_the_slowest_core_decides() -> None:
    slow = Core("avx2", "float32", 40e9, True)
    assert slowest([AVX2, slow, BF16]) == slow and slowest([]) is None


def test_the_peak_is_that_of_the_dtype_that_the_job_computes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    auto = demo_teacher(AVX2)
    assert auto["dtype"] == "float32" and auto["peak_flops"] == 100e9
    assert demo_teacher(AVX2, "distill.dtype=float32")["seconds"] == auto["seconds"]
    assert demo_teacher(AVX2, "distill.dtype=bfloat16")["seconds"] > 5 * auto["seconds"]
    fast = demo_teacher(BF16)
    assert fast["dtype"] == "bfloat16" and fast["peak_flops"] == pytest.approx(210e9)
    assert fast["seconds"] < demo_teacher(BF16, "distill.dtype=float32")["seconds"]


def test_a_core_of_half_the_speed_takes_twice_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.forecast.time import START_S

    monkeypatch.chdir(tmp_path)
    half = Core("avx2", "float32", 50e9, True)
    once, twice = demo_teacher(AVX2)["seconds"], demo_teacher(half)["seconds"]
    assert twice - START_S == pytest.approx(2 * (once - START_S))


def test_gpus_in_float32_have_another_peak(tmp_path: Path) -> None:
    half = forecast_models.plan_of(tmp_path / "a")["stages"]
    whole = forecast_models.plan_of(tmp_path / "b", distill__dtype="float32")["stages"]
    assert half["distill"]["peak_flops"] == 989e12 and whole["distill"]["peak_flops"] == 67e12
    assert half["capture"]["peak_flops"] == whole["capture"]["peak_flops"] == 989e12
    assert whole["distill"]["seconds"] > 10 * half["distill"]["seconds"]


def test_a_plan_for_named_gpus_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "_measure", lambda kind: pytest.fail("measured"))
    h200 = named_place("h200", 8, None)
    plan = forecast(spec_of(forecast_models.spec_data(tmp_path)), h200)
    assert plan["place"]["core"]["measured"] is False


def test_a_run_keeps_the_core_that_its_plan_was_made_for(tmp_path: Path) -> None:
    spec = small_job.job_spec(tmp_path)
    spec["teacher"]["model"] = forecast_models.folder_of(
        small_job.model(64, 2), tmp_path / "teacher"
    )
    job = load_spec(small_job.write_spec(spec, tmp_path))
    found = record(job, [(2, 0)], host_memory=16e9, core=AVX2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["place"]["core"] == {
        "kind": "avx2",
        "float32_flops": 100e9,
        "bfloat16_flops": 5e9,
        "measured": True,
    }


@pytest.mark.parametrize("core, words", [(AVX2, "avx2 core; measured"), (None, "avx512_bf16 core")])
def test_the_line_of_peaks_names_kind_and_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, core: Core | None, words: str
) -> None:
    from rich.console import Console

    from jobs.forecast.show import show

    monkeypatch.chdir(tmp_path)
    place = cluster_place([(2, 0)], None, 16e9, *([core] if core else []))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show(forecast(load_spec("demo-teacher"), place)))
    lines = [line for line in console.export_text().splitlines() if line.startswith("Utilisation:")]
    assert len(lines) == 1 and words in lines[0]
    assert ("float32" if core else "bfloat16") in lines[0]


# One thread of a Zen 4 in the real training loop: width, MLP, layers, heads, KV heads, vocabulary,
# tokens of a step; tokens per second in float32 and in bfloat16 (docs/plan.md).
MEASURED = [
    ((128, 320, 2, 4, 2), 2048, 4096, 12757, 16133),
    ((256, 768, 4, 4, 2), 2048, 4096, 2783, 4255),
    ((512, 1408, 8, 8, 8), 8192, 2048, 361, 650),
    ((576, 1536, 30, 9, 3), 8192, 1024, 98, 169),
]
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@pytest.mark.parametrize("sizes, vocab, step, float32, bfloat16", MEASURED)
def test_trainings_take_what_was_measured(
    sizes: tuple[int, ...], vocab: int, step: int, float32: float, bfloat16: float
) -> None:
    from jobs.forecast.parameters import shape_of
    from jobs.forecast.time import train

    config = dict(zip(SIZES, sizes, strict=True))
    shape = shape_of({"model_type": "llama", "tie_word_embeddings": True, **config}, vocab)
    zen4 = Core("avx512_bf16", "bfloat16", 103e9, True)
    place = cluster_place([(1, 0)], None, None, zen4)
    flops = 3 * shape.forward_flops(256)
    for dtype, measured in (("float32", float32), ("bfloat16", bfloat16)):
        work = train(shape, flops, step, 1, shape.parameters, dtype)
        seconds = work.seconds(place, 1, 0, 1.0)
        assert seconds is not None and step / seconds == pytest.approx(measured, rel=0.15)
