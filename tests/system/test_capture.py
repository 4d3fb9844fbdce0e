"""Capture on real process groups, against a plain forward pass of transformers in float64."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.corpora import (
    LENGTH,
    VOCAB,
    data_spec,
    load_plain,
    log_softmax,
    make_corpus,
    plain_logits,
    plain_records,
    save_model,
    stored_records,
    write_texts,
)
from tests.fixtures.ranks import Log, Ranks, Told, start

K, EVAL_K, DRAWS = 8, 256, 20
TEMPERATURES = [2.0, 1.0]
BATCH = 4
NOISE = 3e-5  # float32 forward passes of other batch shapes differ by so much
TOPK = {"method": "topk", "k": K, "temperatures": TEMPERATURES, "step": 0.005}
SAMPLE = {"method": "sample", "draws": DRAWS, "seed": 11}
# Captures that must end with the same records: to the last bit, or to rounding.
EQUAL = ("one", "two", "three", "at-once", "stopped", "killed")
SAME = (*EQUAL, "zero3", "zero3-stopped")


# What runs on the ranks.


def capture_all(jobs: list[tuple[Any, int | None]], meet: Path | None, die_at: int = 0) -> Any:
    """Runs each capture, with a stop at the so-many-th batch; first meets another process.

    die_at: the process kills itself when it is about to publish so often.
    """
    from trainer.teacher.capture import capture
    from trainer.worker import Stopped

    worker = start()
    if meet is not None:
        (meet / str(time.time_ns())).touch()
        while len(list(meet.iterdir())) < 2:
            time.sleep(0.01)
    fences = 0

    def fence() -> None:
        nonlocal fences
        fences += 1
        if fences == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    results = []
    for job, stop_at in jobs:
        log = Log(stop_at)
        told = Told(log.events)
        try:
            hooks = replace(log.hooks(), fence=fence)
            told.metrics = capture(job, replace(worker, hooks=hooks))
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

    def job(
        self,
        cache: str,
        corpus: str = "documents",
        *,
        sharding: str = "none",
        dtype: str = "float32",
        seconds: float = 20.0,
        **spec: Any,
    ) -> Any:
        """A capture of as many epochs of 80 sequences as there are sets of draws.

        seconds: 0 publishes every batch by itself.
        """
        from cluster.storage import open_store
        from trainer.spec.sections import CacheSpec, DistillSpec, TeacherSpec
        from trainer.teacher.job import Capture

        store = open_store(self.root)
        packing = "concat" if corpus == "concat" else "documents"
        return Capture(
            teacher=TeacherSpec(model=str(self.root / "teacher"), dtype=dtype, sharding=sharding),
            cache_spec=CacheSpec(**(spec if "method" in spec else {**TOPK, **spec})),
            data=data_spec(str(self.root / "unused"), packing=packing).model_copy(
                update={"max_tokens": 80 * LENGTH}
            ),
            distill=DistillSpec(steps=10 * spec.get("redraws", 1), tokens_per_step=8 * LENGTH),
            seed=3,
            batch_tokens=BATCH * LENGTH,
            shard_seconds=seconds,
            corpus=store.sub("corpora", corpus),
            cache=store.sub("caches", cache),
        )

    def captured(self, cache: str, corpus: str = "documents", **spec: Any) -> list[Captured]:
        """The cached records of every kind: train (as far as it is read), select, report."""
        from trainer.logits.reader import CacheReader
        from trainer.logits.records import coding_of
        from trainer.teacher.job import wanted

        job, result = self.job(cache, corpus, **spec), []
        for kind, part, numbers in wanted(job, self.corpus(corpus)):
            batch = part.batch(numbers)
            with CacheReader(job.cache, kind) as reader:
                found = reader.read_many([key.tobytes() for key in batch.keys])
            result.append(Captured(kind, coding_of(job.cache_spec, VOCAB, kind), batch, found))
        return result


@dataclass(frozen=True)
class Captured:
    """Cached records of the sequences of a batch."""

    kind: str
    coding: Any
    batch: Any
    records: Any

    def stacked(self, name: str) -> np.ndarray:
        """A field of the records [sequences, positions, ...], float64 unless integer."""
        value = getattr(self.records, name)
        value = value.reshape(len(self.batch.keys), -1, *value.shape[1:])
        return value if value.dtype.kind == "i" else value.astype(np.float64)


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
    job = world.job
    low = partial(job, dtype="bfloat16", seconds=0.0)
    zero3 = partial(job, sharding="zero3")
    drawn = partial(job, **SAMPLE)
    killed = Ranks(capture_all, [(job("killed", seconds=0.0), None)], None, 9, world=1)
    lists: list[tuple[int, dict[str, tuple[Any, int | None]]]] = [
        (1, {"at-once": (job("at-once", seconds=0.0), None), "one": (job("one"), None)}),
        (
            1,
            {
                "at-once, too": (job("at-once", seconds=0.0), None),
                "concat": (job("concat", "concat"), None),
                "all-ids": (job("all-ids", k=4 * VOCAB), None),
                "low-one": (low("low-one"), None),
                "drawn": (drawn("drawn", redraws=3), None),
            },
        ),
        (
            2,
            {
                "two": (job("two", seconds=0.0), None),
                "two, again": (job("two"), None),
                "two, grown": (job("two", "grown"), None),
                "zero3": (zero3("zero3"), None),
                "stopped, first": (job("stopped", seconds=0.0), 5),
                "zero3-stopped, first": (zero3("zero3-stopped"), 3),
                "zero3-stopped": (zero3("zero3-stopped"), None),
                "low-stopped, first": (low("low-stopped"), 5),
                "drawn-later, first": (drawn("drawn-later"), None),
                "drawn-later": (drawn("drawn-later", redraws=3), None),
            },
        ),
        (
            3,
            {
                "three": (job("three"), None),
                "stopped": (job("stopped"), None),
                "killed": (job("killed"), None),
                "low-stopped": (low("low-stopped"), None),
            },
        ),
    ]
    groups = [
        Ranks(capture_all, list(jobs.values()), meet if ranks == 1 else None, world=ranks)
        for ranks, jobs in lists[:2]
    ]
    results = [group.results() for group in groups]
    assert [process.wait(400) for process in killed.processes] == [-signal.SIGKILL]
    for ranks, jobs in lists[2:]:
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
    """How far beyond the codec's bound the cached probabilities are; above 0 is wrong."""
    from trainer.logits.codec import error_bound

    exact = np.take_along_axis(log_p, found.stacked("ids"), axis=-1)
    cached, bound = found.stacked("log_probs"), error_bound(exact, found.coding)
    if found.coding.method == "topk":  # of roots of probabilities
        exact, cached = np.exp(exact / 2), np.exp(cached / 2)
    return np.abs(cached - exact) - bound - NOISE


# What is in the records.


@pytest.mark.parametrize("name", SAME)
def test_records_are_what_a_plain_forward_pass_gives(world, runs, truth, name) -> None:
    """Some workers, sharded and not, stopped, killed and continued, and two captures at once."""
    positions = 0
    for found, log_p in zip(world.captured(name), truth, strict=True):
        assert error_of(found, log_p).max() <= 0
        k = K if found.kind == "train" else EVAL_K
        assert found.stacked("ids").shape == (*log_p.shape[:2], k)
        positions += log_p.shape[0] * log_p.shape[1]
    assert positions >= 1000


def test_positions_shifted_by_one_do_not_pass_for_right(world, runs, truth) -> None:
    for found, log_p in zip(world.captured("one"), truth, strict=True):
        wrong = error_of(found, np.roll(log_p, 1, axis=1))
        assert (wrong[:, 1:].max(axis=-1) > 0.01).mean() > 0.95


@pytest.mark.parametrize("name", SAME)
def test_the_most_likely_ids_and_the_tail_of_each_temperature(world, runs, truth, name) -> None:
    for found, log_p in zip(world.captured(name), truth, strict=True):
        k = K if found.kind == "train" else EVAL_K
        # Records for evaluation have the tail at temperature 1, whatever training asks for.
        temperatures = TEMPERATURES if found.kind == "train" else [1.0]
        ids, _, tails = plain_records(log_p, k, temperatures)
        cached = found.stacked("ids")
        if found.kind == "train":  # in any order, each once
            cached = np.sort(cached, axis=-1)
            assert (np.diff(cached, axis=-1) > 0).all()
            edge = np.diff(np.sort(-log_p, axis=-1)[..., k - 1 : k + 1], axis=-1)[..., 0]
            clear = edge > 2 * NOISE  # the first one left out is clearly less likely
            assert (cached == np.sort(ids, axis=-1))[clear].all()
        else:  # the most likely first, as far as half precision tells
            clear = np.diff(np.sort(-log_p, axis=-1)[..., :2], axis=-1)[..., 0] > 0.01
            assert (cached[..., 0] == ids[..., 0])[clear].all()
        assert clear.mean() > 0.9
        bound = 2 * NOISE if found.kind == "eval" else 0.03
        np.testing.assert_allclose(found.stacked("log_tails"), tails, atol=bound)
        tail = found.stacked("log_tails")[..., temperatures.index(1.0)]
        mass = np.exp(found.stacked("log_probs")).sum(axis=-1)
        np.testing.assert_allclose(mass + np.exp(tail), 1, atol=0.02)


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
    found = world.captured("all-ids", k=4 * VOCAB)[0]
    assert found.stacked("ids").shape[-1] == VOCAB
    assert (np.sort(found.stacked("ids"), axis=-1) == np.arange(VOCAB)).all()
    assert np.isneginf(found.stacked("log_tails")).all()


# The draws.


def test_draws_are_those_of_the_plain_distribution_function(world, runs, truth) -> None:
    """In float64, with the random numbers of seed, sequence key, position and redraw."""
    import torch

    from trainer.teacher.sampling import stream, uniforms

    sums = np.cumsum(np.exp(truth[0]), axis=-1)
    seen = []
    for redraw, found in enumerate(world.captured("drawn", **SAMPLE, redraws=3)[:3]):
        counts = np.exp(found.stacked("log_probs")) * DRAWS
        counts[found.records.log_probs.reshape(counts.shape) == -np.inf] = 0
        np.testing.assert_allclose(counts, np.rint(counts), atol=1e-4)
        assert (counts.sum(axis=-1).round() == DRAWS).all()
        dense = np.zeros(truth[0].shape)
        expected = np.zeros(truth[0].shape)
        for i, key in enumerate(found.batch.keys):
            words = torch.tensor(stream(SAMPLE["seed"], key.tobytes(), redraw)).expand(LENGTH, 4)
            u = uniforms(words, torch.arange(LENGTH), DRAWS).numpy()
            for t in range(LENGTH):
                np.add.at(dense[i, t], found.stacked("ids")[i, t], counts[i, t].round())
                ids = np.searchsorted(sums[i, t], u[t] * sums[i, t, -1], side="right")
                np.add.at(expected[i, t], ids, 1)
        moved = np.abs(dense - expected).sum() / 2 / expected.sum()
        assert moved < 1e-3  # float32 logits: a number at an edge may fall on its other side
        seen.append(dense)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(seen[one] - seen[other]).sum() / 2 / seen[one].sum() > 0.2


def test_draws_are_unbiased(world, runs, truth) -> None:
    """The mean log p over draws against minus the entropy, in standard errors."""
    log_p = truth[0]
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(axis=-1)
    variance = (p * log_p**2).sum(axis=-1) - entropy**2
    for found in world.captured("drawn", **SAMPLE, redraws=3)[:3]:
        shares = np.exp(found.stacked("log_probs"))
        drawn = (shares * np.take_along_axis(log_p, found.stacked("ids"), -1)).sum(axis=-1)
        z = (drawn + entropy).sum() / np.sqrt((variance / DRAWS).sum())
        assert abs(z) < 4


def test_further_sets_of_draws_are_added_and_are_the_same_ones(world, runs) -> None:
    """One forward pass fills all kinds; sets that came later equal those made at once."""
    first, then = runs["drawn-later, first"][0].metrics, runs["drawn-later"][0].metrics
    assert first["sequences"] == 96 and first["present"] == 0
    assert then["sequences"] == 80 and then["present"] == 16
    assert then["tokens"] == 80 * LENGTH
    assert runs["drawn"][0].metrics["tokens"] == 96 * LENGTH
    later, at_once = stored(world, "drawn-later"), stored(world, "drawn")
    assert {kind for kind, _ in later} == {"train", "train1", "train2", "eval"}
    assert len(later) == 3 * 80 + 16 and later == at_once


def test_sets_of_draws_that_no_epoch_reads_are_left_out(world, runs) -> None:
    from trainer.teacher.job import wanted

    job = world.job("drawn", **SAMPLE, redraws=3)
    shorter = replace(job, distill=job.distill.model_copy(update={"steps": 11}))
    kinds = [kind for kind, _, _ in wanted(shorter, world.corpus("documents"))]
    assert kinds == ["train", "train1", "eval", "eval"]


# What is captured, and what is not.


def stored(world: World, cache: str) -> dict[tuple[str, bytes], list[bytes]]:
    """The stored bytes of all records by kind and key: a list, if there are several."""
    return stored_records(world.job(cache).cache)


def test_records_are_byte_equal_whoever_makes_them(world, runs) -> None:
    """1, 2 and 3 workers, stopped on 2 and continued on 3, killed, two captures at once."""
    from trainer.logits.store import read_codebook

    truth = stored(world, "one")
    assert len(truth) == 96
    for name in EQUAL[1:]:
        found = stored(world, name)
        if name == "two":  # a corpus that grew came after it
            found = {key: found[key] for key in truth}
        assert {key: set(blobs) for key, blobs in found.items()} == {
            key: set(blobs) for key, blobs in truth.items()
        }
        for family in ("train", "eval"):
            books = [read_codebook(world.job(of).cache, family) for of in ("one", name)]
            assert books[0].to_bytes() == books[1].to_bytes()
    assert len(stored(world, "low-one")) == 96
    assert stored(world, "low-one") == stored(world, "low-stopped")
    assert stored(world, "low-one") != truth


def test_only_what_the_schedule_reads_is_captured(world, runs) -> None:
    from trainer.logits.reader import CacheReader

    job, corpus = world.job("one"), world.corpus("documents")
    reader, part = CacheReader(job.cache, "train"), corpus.part("train")
    assert len(reader) == 80 < len(part)
    metrics = runs["one"][0].metrics
    assert (metrics["sequences"], metrics["present"]) == (80 + 7 + 9, 0)
    assert metrics["tokens"] == 96 * LENGTH
    assert all(len(blobs) == 1 for blobs in stored(world, "one").values())


def test_metrics_tell_bytes_and_where_the_time_went(world, runs) -> None:
    for name in ("one", "two", "three"):
        metrics = runs[name][0].metrics
        folder = world.job(name).cache
        size = sum(folder.size(f"shards/{entry}") for entry in folder.list("shards"))
        assert metrics["bytes"] == size - (name == "two") * grown_bytes(runs)
        each = metrics["bytes_per_token"]
        assert each["eval"] * 16 + each["train"] * 80 == pytest.approx(metrics["bytes"] / LENGTH)
        assert 0 < metrics["forward_s"] < metrics["seconds"]
        assert 0 <= metrics["wait_s"] < metrics["seconds"]
        assert metrics["world"] == len(runs[name]) and metrics["parameters"] > 10_000
        done = [e for e in runs[name][0].events if e["event"] == "progress"]
        assert {e["part"]: e["done"] for e in done} == {"eval": 16, "train": 80}
        assert all(e["tokens_per_s"] > 0 for e in done if e["done"])


def test_bytes_per_token_are_of_one_set_of_draws_and_of_one_family(world, runs) -> None:
    cache = world.job("drawn", redraws=3, **SAMPLE).cache
    sizes: dict[str, int] = {"train": 0, "eval": 0}
    for name in cache.list("shards"):
        sizes["eval" if name.startswith("eval") else "train"] += cache.size(f"shards/{name}")
    each = runs["drawn"][0].metrics["bytes_per_token"]
    assert each["eval"] == pytest.approx(sizes["eval"] / (16 * LENGTH))
    assert each["train"] == pytest.approx(sizes["train"] / (3 * 80 * LENGTH))
    assert each["eval"] > 2 * each["train"]


def grown_bytes(runs: dict[str, list[Told]]) -> int:
    """What the capture of the grown corpus added to the cache "two"."""
    return runs["two, grown"][0].metrics["bytes"]


@pytest.mark.parametrize("name", ["stopped", "zero3-stopped", "low-stopped"])
def test_a_stopped_capture_is_continued_where_it_was(world, runs, name) -> None:
    first, then = runs[f"{name}, first"], runs[name]
    assert all(told.error == "capture stopped" for told in first)
    present = then[0].metrics["present"]
    assert 0 < present < 96
    for told in then:
        assert told.metrics["present"] == present
        assert told.metrics["sequences"] == 96 - present
    assert then[0].first("capture_start")["missing"] == 96 - present
    assert all(len(blobs) == 1 for blobs in stored(world, name).values())


def test_a_killed_capture_is_continued_where_it_was(world, runs) -> None:
    metrics = runs["killed"][0].metrics
    assert 0 < metrics["present"] < 96
    assert metrics["sequences"] == 96 - metrics["present"]
    assert all(len(blobs) == 1 for blobs in stored(world, "killed").values())


def test_a_capture_of_what_is_there_runs_no_teacher(runs) -> None:
    metrics = runs["two, again"][0].metrics
    assert metrics["present"] == 96 and metrics["sequences"] == metrics["tokens"] == 0


def test_of_a_corpus_that_grew_only_the_new_sequences_are_captured(world, runs) -> None:
    metrics = runs["two, grown"][0].metrics
    assert metrics["present"] > 0 and metrics["sequences"] > 0
    assert metrics["tokens"] == metrics["sequences"] * LENGTH
    found = stored(world, "two")
    assert len(found) == 96 + metrics["sequences"]
    assert all(len(blobs) == 1 for blobs in found.values())
    for item in world.captured("two", "grown"):
        log_p = log_softmax(plain_logits(world.teacher, item.batch, by_document=True))
        assert error_of(item, log_p).max() <= 0


def test_two_captures_at_once_end_with_one_whole_cache(world, runs) -> None:
    for name in ("at-once", "at-once, too"):
        assert runs[name][0].metrics["sequences"] == 96  # both began with nothing
    found = stored(world, "at-once")
    assert len(found) == 96
    assert all(len(set(blobs)) == 1 for blobs in found.values())


def test_a_sharded_teacher_says_so(runs) -> None:
    assert runs["zero3"][0].first("teacher")["sharding"] == "zero3"
    assert runs["two"][0].first("teacher")["sharding"] == "none"
