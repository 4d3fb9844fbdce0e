from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.storage import EventWriter, open_store
from jobs.spec.job import JobSpec
from tests.fixtures import small_job
from trainer.processor import cpu_dtype
from trainer.resolve_auto import recorded_dtypes, resolve, undecided_dtypes, with_auto, with_dtypes


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    values = small_job.job_spec(tmp_path)
    del values["teacher"]["dtype"], values["distill"]["dtype"]
    return JobSpec(**values)


def test_auto_is_replaced_section_by_section(spec: JobSpec) -> None:
    assert undecided_dtypes(spec) == ["teacher", "distill", "sweep"]
    dtypes = {"teacher": "bfloat16", "distill": "float32", "sweep": "bfloat16"}
    found = with_dtypes(spec, dtypes)
    assert {name: getattr(found, name).dtype for name in dtypes} == dtypes
    assert undecided_dtypes(found) == []
    assert with_dtypes(found, dict.fromkeys(dtypes, "float32")) == found, "what is said stays"
    assert with_auto(found, ["teacher", "distill", "sweep"]) == spec


def test_without_more_this_machine_decides(spec: JobSpec) -> None:
    assert {resolve(spec).teacher.dtype, resolve(spec).sweep.dtype} == {cpu_dtype()}


def test_what_a_run_computed_in_is_read_back(tmp_path: Path) -> None:
    store = open_store(tmp_path).sub("run")
    assert recorded_dtypes(store) == {}
    values = {"teacher": {"dtype": "bfloat16"}, "distill": {"dtype": "auto"}, "sweep": None}
    store.write_text("spec.yaml", yaml.safe_dump(values))
    assert recorded_dtypes(store) == {"teacher": "bfloat16"}
    store.write_text("spec.yaml", "[broken")
    assert recorded_dtypes(store) == {}


def test_a_run_under_torchrun_has_its_spec_in_the_events(tmp_path: Path) -> None:
    store = open_store(tmp_path).sub("run")
    with EventWriter(store, 1) as events:
        events.emit("run_start", name="run", spec={"distill": {"dtype": "float32"}})
    assert recorded_dtypes(store) == {"distill": "float32"}
