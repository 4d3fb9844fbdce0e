from __future__ import annotations

from pathlib import Path

import pytest

from jobs.forecast.dtypes import decide_dtypes, local_dtypes
from jobs.pipeline.pipeline import prepare_job
from jobs.spec.job import JobSpec
from jobs.spec.load import load_spec
from jobs.submit.portable import portable
from tests.fixtures import small_job
from tests.fixtures.corpora import LENGTH, make_corpus, save_model, write_texts
from trainer.processor import cpu_dtype
from trainer.resolve_auto import recorded_dtypes

SECTIONS = ("teacher", "distill", "sweep")


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """A job with every dtype auto and a teacher that is there."""
    from cluster.storage import open_store
    from trainer.spec.sections import DataSpec

    data = {"train": [{"source": write_texts(tmp_path / "texts")}], "sequence_length": LENGTH}
    held = {"select_sequences": 4, "report_sequences": 4}
    corpus = make_corpus(open_store(tmp_path).sub("corpus"), DataSpec(**data, **held))
    teacher = save_model(tmp_path / "teacher", corpus.tokenizer_folder())
    values = small_job.job_spec(tmp_path, data={**data, **held})
    values["teacher"] = {"model": str(teacher)}
    del values["distill"]["dtype"]
    return load_spec(small_job.write_spec(values, tmp_path))


def resources(spec: JobSpec, **changes: dict) -> JobSpec:
    update = {
        name: getattr(spec.resources, name).model_copy(update=change)
        for name, change in changes.items()
    }
    return spec.model_copy(update={"resources": spec.resources.model_copy(update=update)})


def test_cpus_compute_in_what_all_are_fast_at(spec: JobSpec) -> None:
    fast, slow = ["bfloat16", "bfloat16"], ["bfloat16", "float32"]
    assert decide_dtypes(spec, False, fast) == dict.fromkeys(SECTIONS, "bfloat16")
    assert decide_dtypes(spec, False, slow) == dict.fromkeys(SECTIONS, "float32")
    assert decide_dtypes(spec, False, []) == dict.fromkeys(SECTIONS, "float32")


def test_gpus_compute_in_bfloat16_where_they_are_used(spec: JobSpec) -> None:
    found = decide_dtypes(spec, True, ["float32"])
    # The cells of a small model take no GPU.
    assert found == {"teacher": "bfloat16", "distill": "bfloat16", "sweep": "float32"}
    without = resources(spec, capture={"gpus_per_worker": 0}, sweep={"gpus_per_cell": 1.0})
    found = decide_dtypes(without, True, ["float32"])
    assert found == {"teacher": "float32", "distill": "bfloat16", "sweep": "bfloat16"}


def test_what_is_said_is_not_decided(spec: JobSpec) -> None:
    said = spec.model_copy(
        update={"distill": spec.distill.model_copy(update={"dtype": "bfloat16"})}
    )
    assert decide_dtypes(said, False, ["float32"]) == {"teacher": "float32", "sweep": "float32"}


def test_a_run_keeps_what_it_began_with(spec: JobSpec) -> None:
    job = prepare_job(spec, local=True)
    assert job.spec.teacher.dtype == job.spec.sweep.dtype == cpu_dtype()
    assert job.undecided == [] and local_dtypes(spec) == dict.fromkeys(SECTIONS, cpu_dtype())
    other = "float32" if cpu_dtype() == "bfloat16" else "bfloat16"
    job.run.store.write_text("spec.yaml", f"teacher: {{dtype: {other}}}")
    assert recorded_dtypes(job.run.store) == {"teacher": other}
    again = prepare_job(spec, local=True)
    assert again.spec.teacher.dtype == other and again.spec.distill.dtype == cpu_dtype()


def test_the_cache_is_of_what_auto_became(spec: JobSpec) -> None:
    """So a cache that was filled with the dtype by its name serves `auto` too."""
    for dtype in ("float32", "bfloat16"):
        job = prepare_job(spec, dtypes=dict.fromkeys(SECTIONS, dtype))
        teacher = spec.teacher.model_copy(update={"dtype": dtype})
        named = prepare_job(spec.model_copy(update={"teacher": teacher}), local=True)
        assert job.resolved.names.cache == named.resolved.names.cache
        assert job.resolved.names.teacher["dtype"] == dtype


def test_on_a_cluster_the_nodes_decide(spec: JobSpec, tmp_path: Path) -> None:
    job = prepare_job(spec)
    assert job.undecided == list(SECTIONS)
    sent = portable(job, [str(tmp_path)])
    assert {getattr(sent, name).dtype for name in SECTIONS} == {"auto"}
    decided = prepare_job(spec, dtypes=dict.fromkeys(SECTIONS, "float32"))
    assert {getattr(decided.spec, name).dtype for name in SECTIONS} == {"float32"}
    assert decided.undecided == []


def test_a_micro_batch_is_for_where_the_student_is_trained(spec: JobSpec, tmp_path: Path) -> None:
    large = {**small_job.model(1024, 24), "intermediate_size": 4096}
    student = spec.student.model_copy(update={"config": large})
    spec = spec.model_copy(update={"student": student})
    sequences = {}
    for gpus in (False, True):
        job = prepare_job(spec, gpus=gpus)
        sequences[gpus] = job.spec.distill.micro_batch
        sent = portable(job, [str(tmp_path)])
        assert sent.distill.micro_batch == sent.distill.activation_checkpointing == "auto"
    assert sequences[True] == 16384 // LENGTH > 10 * sequences[False]
    forced = resources(spec, distill={"gpus_per_worker": 0})
    assert prepare_job(forced, gpus=True).spec.distill.micro_batch == sequences[False]
