"""`stillhouse plan` as a user calls it: what it reads, what it refuses, what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli.main import plan
from jobs.errors import SpecErrors
from jobs.forecast.place import GPUS
from tests.fixtures.forecast_models import LLAMA_8B, plan_of, spec_data

ROOT = Path(__file__).resolve().parents[4]
H200 = ("--gpu", "h200", "--gpus", "16")


def call(*arguments: str) -> Any:
    """The command's result; what it raised is raised."""
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, SpecErrors):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def spec(tmp_path) -> str:
    path = tmp_path / "big.yaml"
    path.write_text(yaml.safe_dump(spec_data(tmp_path)))
    return str(path)


def test_the_tables_say_what_matters(spec) -> None:
    text = call(spec, *H200, "--price", "3.5").stdout
    for words in (
        "big on 2 nodes of 8 x h200",
        "70.6 B",
        "teacher weights, share",
        "optimizer and master weights",
        "logit cache",
        "38 %",
        "GPU hours",
        "Break-even: the cache is cheaper from 2 students on it",
        "another capture",
    ):
        assert words in text, words
    assert all(len(line) <= 100 for line in text.splitlines())


def test_json_is_strict_and_whole(spec) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(call(spec, *H200, "--json").stdout, parse_constant=refuse)
    assert found["models"]["teacher"]["parameters"] == 70_553_706_496
    assert set(found["stages"]) == {"capture", "distill", "sweep"}
    assert found["fits"] is True and found["cells"] == 2
    resolved = found["resolved"]
    assert resolved["distill.micro_batch"] == 4 and resolved["resources.capture.workers"] == 16
    assert resolved["resources.sweep.gpus_per_cell"] == 1 and "teacher.sharding" not in resolved


def test_a_plan_of_70b_imports_nothing_heavy_and_opens_no_weights(spec, tmp_path) -> None:
    """What makes it quick; a weight file that cannot be read would end it."""
    for role in ("teacher", "student"):
        (tmp_path / role / "model.safetensors").mkdir()
    heavy = ("ray", "deepspeed", "torch", "transformers", "datasets")
    code = (
        "import sys, typer\n"
        "from jobs.cli.main import plan\n"
        f"plan({spec!r}, gpu='h200', gpus=16, gpus_per_node=8, price=None, as_json=True)\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_its_import_costs_nothing() -> None:
    code = "import sys, jobs.cli.main; print(len([m for m in sys.modules if 'pydantic' in m]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"


def test_without_a_gpu_it_plans_for_this_machine(spec) -> None:
    text = call(spec, "teacher.sharding=none").stdout
    assert "CPUs" in text and "does not fit" in text


@pytest.mark.parametrize(
    "arguments, line",
    [
        (("--gpu", "k80"), f'--gpu: got "k80"; may be one of {", ".join(GPUS)}'),
        (("--gpus", "4"), "--gpus: needs --gpu, e.g. --gpu h200"),
        (
            ("--gpu", "h200", "--gpus", "8", "--gpus-per-node", "3"),
            "--gpus-per-node: got 3 with --gpus 8; may be a divisor of 8",
        ),
        (
            ("data.sequence_length=16384", *H200),
            "data.sequence_length: 16384 is over the teacher's maximum; may be at most 8192",
        ),
        (
            ("sweep.group_size=[96]", *H200),
            "sweep.group_size: 96 does not divide the 4096 inputs of up_proj of the student; "
            "may be a divisor of it, or channel",
        ),
        (("student.model=./gone", *H200), "student.model: './gone' is no folder"),
        (("data.train=[{source: ./gone/*.txt}]", *H200), "data.train.0.source: no file matches"),
        (("resources.capture.workers=64", *H200), "resources.capture: 64 workers"),
        (("distill.steps=0", *H200), "distill.steps"),
    ],
)
def test_what_a_run_would_refuse_is_refused_in_one_line(spec, arguments, line) -> None:
    with pytest.raises(SpecErrors) as error:
        call(spec, *arguments)
    assert any(fault.startswith(line) for fault in error.value.faults), error.value.faults
    assert all("\n" not in fault for fault in error.value.faults)


def test_all_faults_at_once(spec) -> None:
    with pytest.raises(SpecErrors) as error:
        call(spec, "--gpus", "4", "distill.steps=0", "nonsense=1")
    assert len(error.value.faults) == 3


def test_a_family_that_cannot_learn_is_refused(tmp_path) -> None:
    data = spec_data(tmp_path)
    config = {**LLAMA_8B, "model_type": "bloom"}
    (tmp_path / "student" / "config.json").write_text(json.dumps(config))
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(SpecErrors, match="student.model: got a model of type bloom"):
        call(str(path), *H200)


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_of_so_many_columns_will_do(tmp_path, width) -> None:
    from jobs.forecast.show import show

    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show(plan_of(tmp_path)))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    figures = [line.split()[-2:] for line in text.splitlines() if "teacher weights, share" in line]
    assert figures == [["17.6", "GB"]]  # 141.1 GB over the eight GPUs of a node


def test_gpus_by_the_names_of_drivers_and_of_ray() -> None:
    from jobs.forecast.place import gpu_named

    for name, key in {
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "A100-80G": "a100-80",
        "A100-40G": "a100-40",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "L4": "l4",
        "NVIDIA A10G": "a10g",
        "NVIDIA GeForce RTX 4090": "4090",
    }.items():
        found = gpu_named(name)
        assert found is not None and found.key == key, name
    assert gpu_named("NVIDIA L40") is None and gpu_named("Tesla T4") is None
