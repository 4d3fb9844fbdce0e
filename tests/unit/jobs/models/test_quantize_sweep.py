"""quantize without --out: which run it makes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jobs.cli.main import main
from tests.fixtures.model_commands import run, told


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the pipeline, which is tested with a cluster: keeps the specs."""
    calls: list[Any] = []
    module = ModuleType("jobs.pipeline.pipeline")
    module.run_pipeline = lambda spec: calls.append(spec) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jobs.pipeline.pipeline", module)
    return calls


def test_without_out_it_is_a_sweep(here: Path, pipeline: list[Any]) -> None:
    command = "quantize model data.report_sequences=5 --bits 8,4 --group-size 16,channel"
    assert main([*command.split(), "--methods", "hqq,rtn", "--data", "texts/*.txt"]) == 0
    (spec,) = pipeline
    assert (spec.name, spec.teacher, spec.distill) == ("model-quantized", None, None)
    assert (spec.student.model, spec.student.init) == ("model", "pretrained")
    assert [source.source for source in spec.data.train] == ["texts/*.txt"]
    assert (spec.data.sequence_length, spec.data.report_sequences) == (32, 5)
    assert [cell.key for cell in spec.sweep.cells()] == [
        f"{method}-{bits}b-{size}"
        for method in ("hqq", "rtn")
        for bits in (8, 4)
        for size in ("g16", "channel")
    ]
    # the speed is measured within the model's 32 positions
    assert spec.sweep.speed_prompt_tokens + spec.sweep.speed_decode_tokens <= 32


def test_a_sweep_has_defaults(pipeline: list[Any]) -> None:
    assert run("quantize ./model --storage s --name mine --embeddings --head") == 0
    (spec,) = pipeline
    assert (spec.name, spec.storage) == ("mine", "s")
    assert spec.data.train[0].source == "builtin:python-docs"
    assert [cell.key for cell in spec.sweep.cells()] == [
        f"hqq-{bits}b-g32-embeddings-head"
        for bits in (8, 4, 3, 2)  # the model is 32 wide
    ]


def test_wrong_options_of_a_sweep(pipeline: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "quantize model --bits 4 --layer *=8 --device cpu") == [
        "--layer: needs --out; the cells of a sweep have the same bits everywhere",
        "--device: needs --out; a sweep takes what its Ray cluster has",
    ]
    assert told(capsys, "quantize model --bits 4 steps=3 x") == [
        'override "x": may be key=value, e.g. distill.steps=100',
        "steps: unknown key; did you mean distill.steps or sweep.recover.steps?",
    ]
    assert told(capsys, "quantize model --bits 4,4") == ["--bits: got 4, 4; give each value once"]
    assert told(capsys, "quantize model --bits 4,3 --group-size 128 --method int8-dynamic") == [
        "--method int8-dynamic: has --bits 8 and --group-size channel, no others"
    ]
    assert pipeline == []
    assert run("quantize model --bits 8,4 --method int8-dynamic,rtn --group-size 16") == 0
    assert run("quantize model --method int8-dynamic") == 0
    assert [[cell.key for cell in spec.sweep.cells()] for spec in pipeline] == [
        ["int8-dynamic-8b-channel", "rtn-8b-g16", "rtn-4b-g16"],
        ["int8-dynamic-8b-channel"],
    ]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b-quantized"),
        ("s3://bucket/runs/demo/student", "demo-quantized"),
        ("./", "model-quantized"),
        ("x" * 99, "x" * 50 + "-quantized"),
    ],
)
def test_the_run_is_named_after_the_model(model: str, name: str) -> None:
    from jobs.models.quantize import run_name

    if model == "./":
        os.chdir("model")
    assert run_name(model) == name
