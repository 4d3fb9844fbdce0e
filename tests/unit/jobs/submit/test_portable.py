"""What of a spec another machine can use, and what is refused with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import open_store
from cluster.storage.keys import fingerprint
from jobs.errors import SpecErrors
from jobs.pipeline.pipeline import Job, prepare_job
from jobs.run.inputs import ResolvedJob
from jobs.spec.load import load_spec
from jobs.stages import prepare as prepare_stage
from jobs.submit.portable import portable
from tests.fixtures import small_job
from trainer.corpus.prepare import prepare
from trainer.stage_inputs import identities


def job(folder: Path, **changes: Any) -> Job:
    """A plain training whose student is a config file, below `folder`."""
    spec = {**small_job.teacher_spec(folder), **changes}
    config = folder / "student.json"
    config.write_text(json.dumps(small_job.model(64, 2)))
    spec["student"] = {"init": "random", "config": str(config)}
    return prepare_job(load_spec(small_job.write_spec(spec, folder)))


def faults(*arguments: Any) -> list[str]:
    with pytest.raises(SpecErrors) as error:
        portable(*arguments)
    return error.value.faults


def test_local_storage_and_sources_are_refused_with_the_way_out(tmp_path: Path) -> None:
    found = faults(job(tmp_path), [])
    assert len(found) == 2
    assert found[0].startswith("storage: ") and "storage=s3://bucket/prefix" in found[0]
    assert found[1].startswith("data.train.0.source: ")
    assert "--until prepare storage=s3://bucket/prefix" in found[1]
    assert "--shared" in faults(job(tmp_path), [str(tmp_path / "nowhere")])[0]


def test_what_lies_below_a_shared_folder_stays_as_it_is(tmp_path: Path) -> None:
    given = job(tmp_path)
    spec = portable(given, [str(tmp_path)])
    assert spec.storage == str(tmp_path / "runs") and spec.data == given.spec.data
    assert spec.student.config == small_job.model(64, 2)  # a file of this machine no longer


def test_relative_paths_mean_the_same_in_the_folder_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train = [{"source": "texts/*.jsonl"}, {"source": "builtin:python-docs"}]
    data = {**small_job.teacher_spec(tmp_path)["data"], "train": train}
    given = job(tmp_path, storage="./runs", data=data)
    spec = portable(given, [str(tmp_path)])
    assert spec.storage == str(tmp_path / "runs")
    assert spec.data is not None
    assert [source.source for source in spec.data.train] == [
        str(tmp_path / "texts" / "*.jsonl"),
        "builtin:python-docs",
    ]
    before, after = (fingerprint(identities(each).corpus) for each in (given.spec, spec))
    assert before == after


def test_a_folder_that_only_begins_alike_is_not_shared(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert len(faults(job(tmp_path), [str(tmp_path / "run")])) == 2


def test_a_corpus_that_is_made_already_needs_no_sources(tmp_path: Path) -> None:
    """In a storage that the cluster sees; whoever runs the job there reads its name alone."""
    storage = "memory://portable"
    given = job(tmp_path, storage=storage)
    names = identities(given.spec)
    corpus = fingerprint(names.corpus)
    store = open_store(storage)
    prepare(
        given.spec.data, given.spec.tokenizer, store.sub("_corpora", corpus), identity=names.corpus
    )
    values = prepare_stage.inputs(ResolvedJob.of(given.spec), {}).values()
    record = {"inputs": values, "outputs": {"corpus": corpus}}
    store.sub("teacher").write_json("state/prepare-0001.json", record)
    given = job(tmp_path, storage=storage)
    assert given.selection.skipped == ["prepare"]
    spec = portable(given, [])
    assert spec.data is not None and spec.data.corpus == corpus

    for path in (tmp_path / "texts").glob("*"):
        path.unlink()
    there = prepare_job(spec)
    assert there.selection.skipped == ["prepare"] and there.selection.to_run == [
        "distill",
        "summarize",
    ]
    assert fingerprint(identities(there.spec).corpus) == corpus

    other = spec.model_copy(update={"data": spec.data.model_copy(update={"sequence_length": 32})})
    with pytest.raises(SpecErrors) as error:
        prepare_job(other)
    assert "data.sequence_length: got 32" in str(error.value)
    none = spec.model_copy(update={"data": spec.data.model_copy(update={"corpus": "0" * 32})})
    with pytest.raises(SpecErrors) as error:
        prepare_job(none)
    assert "data.corpus: no finished corpus at" in str(error.value)
