"""The trainer's own launcher: what it reads, and what it can do without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.storage import Fenced
from trainer import __main__ as launcher
from trainer.__main__ import load
from trainer.messages import failure_reason
from trainer.training.checkpoint import CheckpointFailed, CheckpointMisfit

GOOD = """\
name: a-run
teacher: {model: org/big}
student: {model: org/small}
data: {train: [{source: "texts/*.txt"}], sequence_length: 64}
distill: {tokens_per_step: 640}
sweep: {bits: [8]}
tracking: {mode: online}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(GOOD)
    return path


def faults(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ValueError) as caught:
        load(str(file), overrides)
    return str(caught.value).splitlines()


def test_it_reads_what_the_pipeline_reads(file: Path) -> None:
    from jobs.spec.load import load_spec

    overrides = ["distill.learning_rate=1e-3", "data.train.0.weight=2", "distill.mode=online"]
    mine, theirs = load(str(file), overrides), load_spec(file, overrides)
    for name in type(mine).model_fields:
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.distill.learning_rate == 1e-3  # text in YAML 1.1


def test_it_keeps_the_rules_of_the_pipeline(file: Path) -> None:
    from jobs.errors import SpecErrors
    from jobs.spec.load import load_spec

    for overrides in (
        ["distill.tokens_per_step=100", "data.max_tokens=3"],
        ["distill.losses={jsd: 1}"],
        ["distill.losses={hidden: 1}"],
        ["teacher=null"],
        ["student.lora={r: 2}", "student.init=random"],
        ["distill.mode=responses", "data.train.0.format=messages"],
        ["data.train=[]"],
        ["teacher.model=./here", "teacher.revision=v2"],
        ["distill.steps=true", "distill.micro_batch=0", "seed=false"],
        ["distill.losses={ce: {weight: {start: a, end: 0}}}"],
        ["distill.losses={ce: {start: 1, end: 0}}"],
        ["name=A", "distill.stpes=1"],
        ["student={init: slice}", "distill.tokens_per_step=100"],
    ):
        with pytest.raises(SpecErrors) as caught:
            load_spec(file, overrides)
        assert faults(file, *overrides) == caught.value.faults, overrides


def test_wrong_values_and_keys_are_a_line_each(file: Path) -> None:
    lines = faults(file, "distill.steps=0", "distill.stpes=1", "nonsense", "name=A")
    assert [line.split(":")[0] for line in lines] == [
        'override "nonsense"',
        "name",
        "distill.steps",
        "distill.stpes",
    ]
    file.write_text(GOOD + "name: b\n")
    assert faults(file) == [
        f'{file}:8: key "name" is there twice, first on line 1; keep one of them'
    ]
    file.write_text("- a\n")
    assert faults(file) == [f"{file}: may be a mapping of keys, e.g. name: a-run"]


def test_it_needs_no_ray_no_hqq_and_no_datasets(file: Path) -> None:
    """On a machine that has none of them the whole path imports, up to a hub data set itself."""
    code = """
import importlib, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "hqq", "datasets", "wandb", "lm_eval", "jobs", "quant"}:
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
import trainer
for module in pkgutil.walk_packages(trainer.__path__, "trainer."):
    importlib.import_module(module.name)
from cluster.storage import Fenced
from trainer import __main__ as launcher
from trainer.__main__ import load
from trainer.training.checkpoint import CheckpointFailed, CheckpointMisfit
from trainer.messages import failure_reason
print(load(sys.argv[1], ()).name)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split()[-1] == "a-run"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("teacher.model: a\nstudent.model: b"), launcher.WRONG),
        (CheckpointMisfit("step 3: damaged"), launcher.FAILED),
        (CheckpointFailed("step 3: no room"), launcher.FAILED),
        (FloatingPointError("distill: step 3: the loss is nan"), launcher.FAILED),
        (Fenced("a newer attempt has taken over"), launcher.FAILED),
        (MemoryError("of this machine"), launcher.FAILED),
    ],
)
def test_what_ends_a_rank_is_told_in_lines(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher._failed(error, is_main=True) == code
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(str(error).splitlines())
    assert all(line.startswith("error: ") for line in told)


def test_what_nobody_expected_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        {}["lost"]
    except KeyError as error:
        assert launcher._failed(error, is_main=True) == launcher.FAILED
    assert "Traceback" in capsys.readouterr().err


def test_too_little_memory_comes_with_ways_out() -> None:
    import torch

    with pytest.raises(RuntimeError) as of_host:
        torch.empty(1 << 60)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), of_host.value):
        why = failure_reason(error)
        assert why.startswith("out of memory (") and "\n" not in why
        assert "lower distill.micro_batch" in why and "distill.zero_stage: 3" in why
    assert failure_reason(RuntimeError("something else")) == "something else"
