"""The trainer's own launcher: what it reads, and what it can do without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.__main__ import load

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
    from jobs.load import load_spec

    overrides = ["distill.learning_rate=1e-3", "data.train.0.weight=2", "distill.mode=online"]
    mine, theirs = load(str(file), overrides), load_spec(file, overrides)
    for name in type(mine).model_fields:
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.distill.learning_rate == 1e-3  # text in YAML 1.1


def test_it_keeps_the_rules_of_the_pipeline(file: Path) -> None:
    from jobs.errors import SpecErrors
    from jobs.load import load_spec

    for overrides in (
        ["distill.tokens_per_step=100", "data.max_tokens=3"],
        ["distill.losses={jsd: 1}"],
        ["distill.losses={hidden: 1}"],
        ["teacher=null"],
        ["student.lora={r: 2}", "student.init=random"],
        ["distill.mode=responses", "data.train.0.format=messages"],
        ["data.train=[]"],
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
from trainer.__main__ import load
print(load(sys.argv[1], ()).name)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split()[-1] == "a-run"
