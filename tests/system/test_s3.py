"""Capture and distill with everything in a bucket, against an S3 server on the loopback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.corpora import (
    LENGTH,
    config_values,
    data_spec,
    make_corpus,
    save_model,
    write_texts,
)
from tests.fixtures.ranks import Log, Told, spawn, start
from tests.fixtures.s3 import point_to, s3_server

STEPS = 5
POOL = 12  # sequences that are read, over more than three epochs


def run_all(jobs: list[Any]) -> list[Told]:
    """Runs captures and trainings one after the other."""
    from trainer.run_task import run_task

    worker, results = start(), []
    for job in jobs:
        log = Log()
        told = Told(log.events)
        told.metrics = run_task(job, replace(worker, hooks=log.hooks()))
        results.append(told)
    return results


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A store in a bucket of an S3 server; processes that are started see it too."""
    from cluster.storage import open_store

    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        point_to(endpoint, patch)
        patch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.mktemp("fetched")))
        yield open_store("s3://bucket/runs")


def jobs_in(store: Any, texts: str, teacher: Path) -> list[Any]:
    """A capture of two sets of draws and a training from them, all in `store`."""
    from trainer.spec.sections import CacheSpec, DistillSpec, StudentSpec, TeacherSpec
    from trainer.teacher.job import Capture
    from trainer.training.job import Training

    data = data_spec(texts, max_tokens=POOL * LENGTH)
    distill = DistillSpec(
        dtype="float32",
        steps=STEPS,
        tokens_per_step=8 * LENGTH,
        micro_batch=2,
        learning_rate=5e-3,
        evaluate_steps=2,
        activation_checkpointing=False,
    )
    shared = {
        "data": data,
        "distill": distill,
        "cache_spec": CacheSpec(draws=6, redraws=2),
        "seed": 3,
        "corpus": store.sub("corpus"),
        "cache": store.sub("cache"),
    }
    return [
        Capture(
            teacher=TeacherSpec(model=str(teacher), dtype="float32", sharding="none"),
            batch_tokens=4 * LENGTH,
            shard_seconds=0.0,
            **shared,
        ),
        Training(
            stage="distill",
            teacher=None,
            student=StudentSpec(config=config_values(), init="random"),
            checkpoints=store.sub("checkpoints"),
            output=store.sub("student"),
            last=store.sub("student-last"),
            **shared,
        ),
    ]


def test_capture_and_distill_from_a_bucket_are_those_from_a_folder(bucket, tmp_path) -> None:
    from cluster.storage import open_store
    from cluster.storage.store import cache_folder
    from trainer.logits.reader import CacheReader

    folder = open_store(tmp_path / "runs")
    texts = write_texts(tmp_path / "texts")
    corpora = [make_corpus(store.sub("corpus"), data_spec(texts)) for store in (folder, bucket)]
    teacher = save_model(tmp_path / "teacher", corpora[0].tokenizer_folder(), width=48)
    jobs = [*jobs_in(folder, texts, teacher), *jobs_in(bucket, texts, teacher)]
    captured, trained, captured_s3, trained_s3 = spawn(run_all, jobs, world=2)[0]
    assert captured_s3.metrics["sequences"] == captured.metrics["sequences"] > POOL
    assert trained_s3.losses() == trained.losses() and len(set(trained.losses())) == STEPS
    for name in ("select_ce", "select_forward_kl", "weights"):
        assert trained_s3.metrics[name] == trained.metrics[name]
    for kind in ("train", "train1", "eval"):
        with (
            CacheReader(folder.sub("cache"), kind) as one,
            CacheReader(bucket.sub("cache"), kind) as other,
        ):
            assert np.array_equal(one.keys, other.keys) and len(one)
            keys = [key.tobytes() for key in one.keys]
            ours, theirs = one.read_many(keys), other.read_many(keys)
            assert np.array_equal(ours.ids, theirs.ids)
            assert np.array_equal(ours.log_probs, theirs.log_probs)
    # Of shards exactly the wanted bytes were read: none was copied as a whole.
    copies = {path.name for path in cache_folder().rglob("*") if path.is_file()}
    assert "train-00000.arrow" in copies and not copies & set(bucket.list("cache/shards"))
