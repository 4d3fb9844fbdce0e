"""run --each: which runs it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.errors import SpecErrors, StageFailed
from jobs.spec.load import each_spec, run_each, slug
from tests.fixtures import small_job


@pytest.fixture
def spec(tmp_path: Path) -> str:
    return str(small_job.write_spec(small_job.job_spec(tmp_path, documents=4), tmp_path))


def test_a_run_for_each_value_with_shared_corpus_and_cache(spec: str) -> None:
    jobs = each_spec(spec, ["seed=3"], "distill.steps=10,20")
    assert [(job.name, job.distill.steps) for job in jobs if job.distill] == [
        ("job-10", 10),
        ("job-20", 20),
    ]
    assert {job.storage for job in jobs} == {jobs[0].storage} and jobs[1].seed == 3
    assert jobs[0].cache == jobs[1].cache and jobs[0].data == jobs[1].data


def test_students_are_named_after_their_models(spec: str) -> None:
    jobs = each_spec(
        spec,
        ["student={model: x, init: pretrained}", "name=base"],
        "student.model=Qwen/Qwen3-0.6B,runs/demo/student,HuggingFaceTB/SmolLM2-135M",
    )
    names = ["base-qwen3-0.6b", "base-demo", "base-smollm2-135m"]
    assert [job.name for job in jobs] == names
    assert [job.student.model for job in jobs][1] == "runs/demo/student"


def test_values_with_commas_of_their_own(spec: str) -> None:
    jobs = each_spec(spec, [], "sweep.bits=[[8, 4], [3]]")
    assert [job.sweep.bits for job in jobs if job.sweep] == [[8, 4], [3]]
    assert [job.name for job in jobs] == ["job-8-4", "job-3"]


def test_two_values_with_the_same_slug_get_numbers(spec: str) -> None:
    jobs = each_spec(spec, ["student={model: x, init: pretrained}"], "student.model=a/m,b/m")
    assert [job.name for job in jobs] == ["job-m-1", "job-m-2"]


@pytest.mark.parametrize("each", ["distill.steps", "=3", "distill.steps=", "seed=1,1", "seed=[1"])
def test_what_is_no_list_of_values_is_refused(spec: str, each: str) -> None:
    with pytest.raises(SpecErrors, match="--each: got"):
        each_spec(spec, [], each)


def test_every_fault_is_told_before_anything_runs(spec: str) -> None:
    with pytest.raises(SpecErrors) as caught:
        each_spec(spec, [], "distill.steps=10,none,-1")
    assert len(caught.value.faults) == 2
    assert all("distill.steps" in fault for fault in caught.value.faults)


def test_one_that_fails_does_not_stop_the_others(spec: str, capsys: Any) -> None:
    jobs = each_spec(spec, [], "seed=1,2,3")
    ran = []

    def run(job: Any) -> int:
        ran.append(job.name)
        if job.seed == 2:
            raise StageFailed("distill", "why", "a.log", "again")
        return 0

    with pytest.raises(StageFailed):
        run_each(jobs, run)
    assert ran == ["job-1", "job-2", "job-3"]
    assert "job-2: distill failed: why" in capsys.readouterr().err
    assert run_each(jobs, lambda job: 0) == 0


def test_names_stay_valid(spec: str) -> None:
    long = yaml.safe_load(Path(spec).read_text())["name"] + "-" + "x" * 50
    (job,) = each_spec(spec, [f"name={long}"], "seed=123456789")
    assert len(job.name) <= 63 and job.name.endswith("-123456789")
    assert slug("///") == "value"
