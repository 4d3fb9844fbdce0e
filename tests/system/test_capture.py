"""Capture on real process groups, against a plain forward pass of transformers in float64."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.material import (
    LENGTH,
    VOCAB,
    data_spec,
    load_plain,
    log_softmax,
    make_corpus,
    plain_logits,
    plain_records,
    save_model,
    write_texts,
)
from tests.ranks import Log, Ranks, Told, start

K, EVAL_K = 8, 256
TEMPERATURES = [2.0, 1.0]
BATCH = 4
NOISE = 3e-5  # float32 forward passes of other batch shapes differ by so much
SAME = ("one", "two", "zero3", "at-once", "stopped", "zero3-stopped")


# What runs on the ranks.


def capture_all(jobs: list[tuple[Any, int | None]], meet: Path | None) -> list[Told]:
    """Runs each capture, with a stop at the so-many-th batch; first meets another process."""
    from trainer import teacher
    from trainer.worker import Stopped

    worker = start()
    make_engine = teacher._Capture._engine
    if meet is not None:
        (meet / str(time.time_ns())).touch()
        while len(list(meet.iterdir())) < 2:
            time.sleep(0.01)
    results = []
    for job, stop_at in jobs:
        log = Log(stop_at)
        told = Told(log.events)

        def spy(run: Any, told: Told = told) -> tuple[Any, int, bool]:
            made = make_engine(run)
            held = (getattr(p, "ds_tensor", p) for p in made[0].parameters())
            told.held_bytes = sum(p.numel() * p.element_size() for p in held)
            return made

        teacher._Capture._engine = spy  # type: ignore[method-assign]
        try:
            told.metrics = teacher.capture(job, replace(worker, hooks=log.hooks()))
        except Stopped as error:
            told.error = str(error)
        results.append(told)
    return results


# The captures.


@dataclass(frozen=True)
class World:
    """Corpora, a teacher, and captures of them into caches of their own."""

    root: Path

    def corpus(self, name: str) -> Any:
        from cluster.storage import open_store
        from trainer.corpus.corpus import open_corpus

        return open_corpus(open_store(self.root).sub("corpora", name))

    @cached_property
    def teacher(self) -> Any:
        return load_plain(self.root / "teacher")

    def job(self, cache: str, corpus: str = "documents", *, sharding: str = "none", k: int = K):
        from cluster.storage import open_store
        from trainer.spec import CacheSpec, DistillSpec, TeacherSpec
        from trainer.teacher import Capture

        store = open_store(self.root)
        packing = "concat" if corpus == "concat" else "documents"
        return Capture(
            teacher=TeacherSpec(
                model=str(self.root / "teacher"), dtype="float32", sharding=sharding
            ),
            cache_spec=CacheSpec(k=k, temperatures=TEMPERATURES),
            data=data_spec(str(self.root / "unused"), packing=packing),
            distill=DistillSpec(steps=10, tokens_per_step=8 * LENGTH),
            seed=3,
            batch_tokens=BATCH * LENGTH,
            shard_seconds=1e-6 if cache == "two" else 20.0,  # a shard per batch, or one in all
            corpus=store.sub("corpora", corpus),
            cache=store.sub("caches", cache),
        )

    def captured(self, cache: str, corpus: str = "documents") -> list[Captured]:
        """The cached records of the train part (as far as it is read), select and report."""
        from trainer.logits.store import CacheReader
        from trainer.teacher import wanted

        job, result = self.job(cache, corpus), []
        for kind, part, numbers in wanted(job, self.corpus(corpus)):
            reader = CacheReader(job.cache, kind)
            batch = part.batch(numbers)
            result.append(Captured(kind, batch, [reader.read(key.tobytes()) for key in batch.keys]))
        return result


@dataclass(frozen=True)
class Captured:
    """Cached records of the sequences of a batch."""

    kind: str
    batch: Any
    records: list[Any]

    def stacked(self, name: str) -> np.ndarray:
        """One field of all records [sequences, positions, ...], float64 unless integer."""
        values = np.stack([getattr(item, name) for item in self.records])
        return values if values.dtype.kind == "i" else values.astype(np.float64)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    from cluster.storage import open_store
    from trainer.corpus.tokenizer import load_tokenizer

    root = tmp_path_factory.mktemp("capture")
    store = open_store(root).sub("corpora")
    texts = write_texts(root / "texts")
    corpus = make_corpus(store.sub("documents"), data_spec(texts))
    save_model(root / "teacher", corpus.tokenizer_folder(), kind="llama", width=48)
    tokenizer = load_tokenizer(root / "teacher")
    make_corpus(store.sub("concat"), data_spec(texts, packing="concat"), tokenizer)
    texts = write_texts(root / "texts", documents=60, seed=1)
    make_corpus(store.sub("grown"), data_spec(texts), tokenizer)
    return World(root)


@pytest.fixture(scope="module")
def runs(world) -> dict[str, list[Told]]:
    """What the ranks said of each capture, by its name."""
    meet = world.root / "meet"
    meet.mkdir()
    lists: list[tuple[int, dict[str, tuple[Any, int | None]]]] = [
        (1, {"at-once": (world.job("at-once"), None), "one": (world.job("one"), None)}),
        (
            1,
            {
                "at-once, too": (world.job("at-once"), None),
                "concat": (world.job("concat", "concat"), None),
                "all-ids": (world.job("all-ids", k=4 * VOCAB), None),
            },
        ),
        (
            2,
            {
                "two": (world.job("two"), None),
                "two, again": (world.job("two"), None),
                "two, grown": (world.job("two", "grown"), None),
                "zero3": (world.job("zero3", sharding="zero3"), None),
                "stopped, first": (world.job("stopped"), 3),
                "stopped": (world.job("stopped"), None),
                "zero3-stopped, first": (world.job("zero3-stopped", sharding="zero3"), 3),
                "zero3-stopped": (world.job("zero3-stopped", sharding="zero3"), None),
            },
        ),
    ]
    groups = [
        Ranks(capture_all, list(jobs.values()), meet if ranks == 1 else None, world=ranks)
        for ranks, jobs in lists[:2]
    ]
    results = [group.results() for group in groups]
    ranks, jobs = lists[2]
    results.append(Ranks(capture_all, list(jobs.values()), None, world=ranks).results())
    return {
        name: [rank[i] for rank in told]
        for (_, jobs), told in zip(lists, results, strict=True)
        for i, name in enumerate(jobs)
    }


@pytest.fixture(scope="module")
def truth(world, runs) -> list[np.ndarray]:
    """Float64 log-probabilities of train (as far as it is read), select and report."""
    return [
        log_softmax(plain_logits(world.teacher, found.batch, by_document=True))
        for found in world.captured("one")
    ]


def error_of(found: Captured, log_p: np.ndarray) -> np.ndarray:
    """How far beyond the codec's bound the cached log-probabilities are; above 0 is wrong."""
    from trainer.logits.codec import error_bound

    exact = np.take_along_axis(log_p, found.stacked("ids"), axis=-1)
    return np.abs(found.stacked("log_probs") - exact) - error_bound(exact) - NOISE


# What is in the records.


@pytest.mark.parametrize("name", SAME)
def test_records_are_what_a_plain_forward_pass_gives(world, runs, truth, name) -> None:
    """One and two workers, sharded and not, stopped and continued, and two captures at once."""
    positions = 0
    for found, log_p in zip(world.captured(name), truth, strict=True):
        assert error_of(found, log_p).max() <= 0
        k = K if found.kind == "train" else EVAL_K
        assert found.stacked("ids").shape == (*log_p.shape[:2], k)
        positions += log_p.shape[0] * log_p.shape[1]
    assert positions >= 1000


def test_positions_shifted_by_one_do_not_pass_for_right(world, runs, truth) -> None:
    found, log_p = world.captured("one")[0], truth[0]
    wrong = error_of(found, np.roll(log_p, 1, axis=1))
    assert (wrong[:, 1:].max(axis=-1) > 0.1).mean() > 0.95


@pytest.mark.parametrize("name", SAME)
def test_the_most_likely_ids_and_the_tail_of_each_temperature(world, runs, truth, name) -> None:
    for found, log_p in zip(world.captured(name), truth, strict=True):
        k = K if found.kind == "train" else EVAL_K
        # Records for evaluation have the tail at temperature 1, whatever training asks for.
        temperatures = TEMPERATURES if found.kind == "train" else [1.0]
        ids, kept, tails = plain_records(log_p, k, temperatures)
        cached = found.stacked("ids")
        gaps = np.diff(np.sort(-log_p, axis=-1)[..., : k + 1], axis=-1)
        clear = gaps > 2 * NOISE  # no other log-probability is within the noise
        clear[..., 1:] &= gaps[..., :-1] > 2 * NOISE
        assert clear.mean() > 0.9
        assert (cached == ids)[clear].all()
        np.testing.assert_allclose(np.take_along_axis(log_p, cached, -1), kept, atol=2 * NOISE)
        np.testing.assert_allclose(found.stacked("log_tails"), tails, atol=2 * NOISE)
        tail = found.stacked("log_tails")[..., temperatures.index(1.0)]
        mass = np.exp(found.stacked("log_probs")).sum(axis=-1)
        np.testing.assert_allclose(mass + np.exp(tail), 1, atol=2e-3)


def test_entropy_and_the_true_tokens_log_probability_are_exact(world, runs, truth) -> None:
    checked = 0
    for found, log_p in zip(world.captured("two")[1:], truth[1:], strict=True):
        entropy = -(np.exp(log_p) * log_p).sum(axis=-1)
        np.testing.assert_allclose(found.stacked("entropy"), entropy, atol=1e-4)
        labels = found.batch.input_ids[:, 1:, None]
        true = np.take_along_axis(log_p[:, :-1], labels, axis=-1)[..., 0]
        counts = found.batch.loss_mask[:, :-1] == 1
        cached = found.stacked("true_log_prob")[:, :-1]
        np.testing.assert_allclose(cached[counts], true[counts], atol=1e-4)
        assert np.abs(cached[:, 1:] - true[:, :-1]).mean() > 0.5  # nor would shifted ones pass
        checked += int(counts.sum())
    assert checked > 300


def test_documents_in_one_sequence_do_not_see_each_other(world, runs, truth) -> None:
    """The truth has each document alone; a mask over whole sequences gives something else."""
    found = world.captured("one")[0]
    leaking = log_softmax(plain_logits(world.teacher, found.batch, by_document=False))
    second = np.cumsum(found.batch.position_ids == 0, axis=1) > 1
    assert second.mean() > 0.1
    assert (np.abs(leaking - truth[0]).max(axis=-1)[second] > 0.01).mean() > 0.9
    assert (error_of(found, leaking).max(axis=-1)[second] > 0).mean() > 0.9


def test_concatenated_documents_see_each_other(world, runs) -> None:
    for found in world.captured("concat", "concat"):
        log_p = log_softmax(plain_logits(world.teacher, found.batch, by_document=False))
        assert error_of(found, log_p).max() <= 0


def test_as_many_ids_as_the_vocabulary_leave_no_tail(world, runs) -> None:
    found = world.captured("all-ids")[0]
    assert found.stacked("ids").shape[-1] == VOCAB
    assert (np.sort(found.stacked("ids"), axis=-1) == np.arange(VOCAB)).all()
    assert np.isneginf(found.stacked("log_tails")).all()


# What is captured, and what is not.


def keys_of(cache: Any) -> list[str]:
    """The keys of all shards, with repeats."""
    names = [name for name in cache.list("shards") if name.endswith(".json")]
    return [key for name in names for key in cache.read_json(f"shards/{name}")["keys"]]


def test_only_what_the_schedule_reads_is_captured(world, runs) -> None:
    from trainer.logits.store import CacheReader

    job, corpus = world.job("one"), world.corpus("documents")
    reader, part = CacheReader(job.cache, "train"), corpus.part("train")
    assert len(reader) == 80 < len(part)
    metrics = runs["one"][0].metrics
    assert (metrics["sequences"], metrics["present"]) == (80 + 7 + 9, 0)
    assert metrics["tokens"] == 96 * LENGTH
    assert len(keys_of(job.cache)) == 96


@pytest.mark.parametrize("name", ["stopped", "zero3-stopped"])
def test_a_stopped_capture_is_continued_where_it_was(world, runs, name) -> None:
    first, then = runs[f"{name}, first"], runs[name]
    assert all(told.error == "capture stopped" for told in first)
    done = 2 * 2 * BATCH  # two batches on each of two ranks; the stop came before the third
    for told in then:
        assert told.metrics["present"] == done
        assert told.metrics["sequences"] == 96 - done
    assert then[0].first("capture_start")["missing"] == 96 - done
    keys = keys_of(world.job(name).cache)
    assert len(keys) == len(set(keys)) == 96


def test_a_capture_of_what_is_there_runs_no_teacher(runs) -> None:
    metrics = runs["two, again"][0].metrics
    assert metrics["present"] == 96 and metrics["sequences"] == metrics["tokens"] == 0


def test_of_a_corpus_that_grew_only_the_new_sequences_are_captured(world, runs) -> None:
    metrics = runs["two, grown"][0].metrics
    assert metrics["present"] > 0 and metrics["sequences"] > 0
    assert metrics["tokens"] == metrics["sequences"] * LENGTH
    keys = keys_of(world.job("two").cache)
    assert len(keys) == len(set(keys)) == 96 + metrics["sequences"]
    for found in world.captured("two", "grown"):
        log_p = log_softmax(plain_logits(world.teacher, found.batch, by_document=True))
        assert error_of(found, log_p).max() <= 0


def test_two_captures_at_once_end_with_one_whole_cache(world, runs) -> None:
    for name in ("at-once", "at-once, too"):
        assert runs[name][0].metrics["sequences"] == 96  # both began with nothing
    assert len(set(keys_of(world.job("at-once").cache))) == 96


def test_a_sharded_teacher_is_half_on_each_of_two_ranks(runs) -> None:
    whole = [told.held_bytes for told in runs["two"]]
    assert whole[0] == whole[1] == 4 * runs["two"][0].metrics["parameters"]
    assert [told.held_bytes for told in runs["zero3"]] == pytest.approx(
        [whole[0] / 2] * 2, rel=0.02
    )
