"""Micro-batches: dealing to ranks, weights, labels, records, and the threads that read ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import open_store
from tests.fixtures.waiting import Clock, until
from trainer.corpus import packing
from trainer.corpus.arrow import write_table
from trainer.corpus.corpus import Part, next_tokens
from trainer.corpus.schedule import Schedule
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import encode
from trainer.logits.reader import CacheReader
from trainer.logits.records import Draws, Records, coding_of, train_kinds
from trainer.logits.store import (
    CacheDamaged,
    CacheMismatch,
    open_cache,
    publish_codebook,
    write_shard,
)
from trainer.spec.sections import CacheSpec
from trainer.training.loader import PartLoader, StepLoader, deal, make_micro_batch
from trainer.training.signals import CachedTeacher

LENGTH, K = 8, 3


@pytest.fixture
def part(tmp_path) -> Part:
    """Sequences of documents of different lengths, so of different numbers of loss tokens."""
    draw = np.random.default_rng(1)
    documents = [
        draw.integers(2, 90, size=size).astype(np.int32) for size in draw.integers(2, 14, size=30)
    ]
    packed = packing.pack(documents, LENGTH, "documents", 1)
    store = open_store(tmp_path)
    info = write_table(store, "train.arrow", packed, np.zeros(len(packed), np.int16))
    return Part(store, {"files": [info.as_dict()]}, LENGTH)


class Shelf:
    """One set of records that say what they are of: the first id is the position, the tails are
    - (sequence + 1000 x set) and 100 less."""

    def __init__(self, part: Part, number: int = 0, width: int = K) -> None:
        self.numbers = {key.tobytes(): i for i, key in enumerate(part.keys)}
        self.number, self.width = number, width
        self.asked: list[bytes] = []
        self.given: Records | None = None

    def read_many(self, keys: Sequence[bytes], length: int) -> Records:
        assert length == LENGTH
        self.asked += keys
        ids = np.arange(LENGTH)[:, None] + 10 * np.arange(self.width)
        said = [-float(self.numbers[key] + 1000 * self.number) for key in keys]
        tails = np.repeat(np.array(said, np.float32), LENGTH)[:, None] - np.array([0, 100], "f4")
        log_probs = np.full((LENGTH * len(keys), self.width), -2.0, np.float32)
        self.given = Records(np.tile(ids, (len(keys), 1)), log_probs, tails)
        return self.given

    def close(self) -> None:
        pass


def taught(part: Part, sets: int = 1, tail: int = 0) -> CachedTeacher:
    shelves = [Shelf(part, i, K + i) for i in range(sets)]
    return CachedTeacher(shelves, LENGTH, tail)  # type: ignore[arg-type]


def ones(count: int) -> np.ndarray:
    return np.ones(count, np.float32)


def loader(part: Part, teacher: CachedTeacher | None = None, **how: Any) -> StepLoader:
    values = {"per_step": 7, "steps": 5, "micro_batch": 2, "rank": 0, "world": 1, **how}
    most = values.get("most")
    schedule = Schedule(part.sources, [1.0], 3, values["per_step"], values["steps"], most)
    return StepLoader(
        part, schedule, teacher, values["micro_batch"], values["rank"], values["world"]
    )


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 6))
def test_dealing_gives_each_sequence_to_one_rank(count, world, multiple) -> None:
    shares = [deal(np.arange(count), rank, world, multiple) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) % multiple == 0
    real = sorted(int(i) for share in shares for i in share if i >= 0)
    assert real == list(range(count))
    for rank, share in enumerate(shares):
        assert all(i % world == rank for i in share if i >= 0)
    assert len(shares[0]) < -(-count // world) + multiple  # no more filling than is needed


def test_labels_are_the_next_tokens() -> None:
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    assert next_tokens(ids).tolist() == [[6, 7, 0], [9, 10, 0]]


def test_positions_are_not_shifted(part) -> None:
    """Labels, records and mask at position t are all about token t + 1."""
    micro = make_micro_batch(part, np.array([4, 1]), ones(2), taught(part))
    batch = part.batch([4, 1])
    labels = micro.labels.reshape(2, LENGTH).numpy()
    counts = micro.token_weights.reshape(2, LENGTH).numpy() > 0
    assert (labels[:, :-1] == batch.input_ids[:, 1:])[counts[:, :-1]].all()
    assert not counts[:, -1].any()
    starts = batch.position_ids == 0
    assert not (counts[:, :-1] & starts[:, 1:]).any()  # no token of another document is predicted
    assert micro.ids is not None and micro.log_tail is not None
    assert (micro.ids.reshape(2, LENGTH, K)[..., 0].numpy() == np.arange(LENGTH)).all()
    assert micro.log_tail.reshape(2, LENGTH).tolist() == [[-4.0] * LENGTH, [-1.0] * LENGTH]


def test_the_tail_is_of_the_temperature_asked_for(part) -> None:
    micro = make_micro_batch(part, np.array([4]), ones(1), taught(part, tail=1))
    assert micro.log_tail is not None
    assert micro.log_tail.tolist() == [-104.0] * LENGTH


def test_records_are_read_at_once_and_not_copied(part) -> None:
    teacher = taught(part)
    micro = make_micro_batch(part, np.array([4, 1, 2]), ones(3), teacher)
    given_ = teacher.readers[0].given  # type: ignore[attr-defined]
    assert micro.ids is not None and micro.log_probs is not None and micro.log_tail is not None
    assert np.shares_memory(micro.ids.numpy(), given_.ids)
    assert np.shares_memory(micro.log_probs.numpy(), given_.log_probs)
    assert np.shares_memory(micro.log_tail.numpy(), given_.log_tails)


def test_every_epoch_reads_its_own_set_of_draws(part) -> None:
    """Also where a step, or one micro-batch, lies across two epochs."""
    sets, steps = 3, 12
    maker = loader(part, taught(part, sets), steps=steps, micro_batch=4, most=10)
    schedule, seen, across = maker.order, set(), 0
    for number in range(steps):
        indices, epochs = schedule.step_indices(number), schedule.step_epochs(number)
        step = maker.step(number)
        assert len(step.micros) == 2
        for start, micro in zip((0, 4), step.micros, strict=True):
            assert micro.ids is not None and micro.log_probs is not None
            assert micro.log_tail is not None
            said = -micro.log_tail.reshape(4, LENGTH)
            found = indices[start : start + 4], epochs[start : start + 4] % sets
            across += len(set(found[1])) > 1
            for i, (sequence, number_) in enumerate(zip(*found, strict=True)):
                assert said[i].tolist() == [sequence + 1000 * number_] * LENGTH
                ids = micro.ids.reshape(4, LENGTH, -1)[i].numpy()
                log_probs = micro.log_probs.reshape(4, LENGTH, -1)[i].numpy()
                width = K + number_
                assert (ids[:, :width] == np.arange(LENGTH)[:, None] + 10 * np.arange(width)).all()
                assert (log_probs[:, :width] == -2.0).all()
                # Unused slots repeat the row's first id without probability.
                assert (ids[:, width:] == ids[:, :1]).all()
                assert np.isneginf(log_probs[:, width:]).all()
                seen.add((int(sequence), int(number_)))
    assert across > 0 and {number for _, number in seen} == {0, 1, 2}


def test_ragged_ends_need_no_sequence_that_was_not_captured(part) -> None:
    """They were filled up with sequence 0, of which the cache may hold nothing."""
    for rank, world in ((1, 2), (3, 4)):  # half a micro-batch of filling, and nothing else
        maker = loader(part, taught(part), per_step=3, world=world, rank=rank, micro_batch=2)
        read = maker.order.step_indices(1)
        assert 0 not in read
        maker.step(1)
        asked = maker.teacher.readers[0].asked  # type: ignore[union-attr]
        assert len(asked) == 2 and set(asked) <= {part.keys[i].tobytes() for i in read}


@pytest.mark.parametrize("method", ["sample", "topk"])
def test_records_of_a_real_cache(part, tmp_path, method) -> None:
    """Those of each sequence by itself, one after the other."""
    settings = {"sample": {"draws": 9, "redraws": 2}, "topk": {"k": 5, "keep": 0.9}}
    spec = CacheSpec(method=method, **settings[method])
    cache = open_cache(open_store(tmp_path).sub("caches"), {"format": 1, **spec.identity()})
    draw = np.random.default_rng(5)
    for kind in train_kinds(spec):
        coding = coding_of(spec, 90, kind)
        records: list[Records | Draws] = []
        for _ in part.keys:
            p = draw.dirichlet(np.full(90, 0.05), size=LENGTH)
            if method == "sample":
                ids = np.stack([np.sort(draw.choice(90, size=9, p=row)) for row in p])
                records.append(Draws(ids.astype(np.int32)))
                continue
            ids = np.argsort(-p, axis=1)[:, :5]
            kept = np.take_along_axis(p, ids, axis=1)
            tails = np.log(np.maximum(1 - kept.sum(axis=1), 1e-9)).astype(np.float32)[:, None]
            records.append(Records(ids.astype(np.int64), np.log(kept).astype(np.float32), tails))
        codebook = publish_codebook(cache, kind, fit_codebook(coding, records))
        blobs = [encode(item, codebook) for item in records]
        write_shard(cache, kind, [row.tobytes() for row in part.keys], blobs)
    teacher = CachedTeacher.for_training(cache, spec, 90, LENGTH, 1.0)
    rows, epochs = np.array([4, 1, 7, 1]), np.array([0, 0, 1, 1])
    micro = make_micro_batch(part, rows, ones(4), teacher, epochs)
    assert micro.ids is not None and micro.log_probs is not None and micro.log_tail is not None
    widths = []
    for i, (row, epoch) in enumerate(zip(rows, epochs, strict=True)):
        kind = train_kinds(spec)[epoch % len(train_kinds(spec))]
        alone = CacheReader(cache, kind).read(part.keys[row].tobytes())
        width = alone.ids.shape[1]
        at = slice(i * LENGTH, (i + 1) * LENGTH)
        assert np.array_equal(micro.ids[at, :width], alone.ids)
        assert np.array_equal(micro.log_probs[at, :width], alone.log_probs)
        assert np.array_equal(micro.log_tail[at], alone.log_tails[:, 0])
        assert np.isneginf(micro.log_probs[at, width:]).all()
        assert (micro.ids[at, width:] == micro.ids[at, :1]).all()
        widths.append(width)
    assert micro.ids.shape == (4 * LENGTH, max(widths))
    teacher.close()
    with pytest.raises(CacheMismatch, match="asked for .*vocab=91.* stillhouse cache rm"):
        CachedTeacher.for_training(cache, spec, 91, LENGTH, 1.0)
    other = CachedTeacher.for_training(cache, spec, 90, LENGTH - 1, 1.0)
    with pytest.raises(CacheDamaged, match=f"{LENGTH} positions; its sequence has {LENGTH - 1}"):
        make_micro_batch(part, rows, ones(4), other, epochs)
    other.close()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_weights_make_the_mean_over_tokens_whatever_the_split(part, world, micro_batch) -> None:
    """Averaging per micro-batch instead of per token: short sequences would weigh too much.

    The engine divides by the micro-batches of a step and its reduction by the ranks.
    """
    for number in range(5):
        total, seen = 0.0, []
        for rank in range(world):
            maker = loader(part, world=world, rank=rank, micro_batch=micro_batch)
            step = maker.step(number)
            assert len(step.micros) == maker.accumulation(7)
            for micro in step.micros:
                assert micro.input_ids.shape == (micro_batch, LENGTH)
                weights = micro.token_weights.numpy() / len(step.micros) / world
                total += weights.sum()
                seen += weights[weights > 0].tolist()
        assert total == pytest.approx(1, rel=1e-6)
        assert len(seen) == step.tokens
        np.testing.assert_allclose(seen, 1 / step.tokens, rtol=1e-6)


def test_ragged_ends_are_filled_with_weight_zero(part) -> None:
    maker = loader(part, world=2, rank=1, micro_batch=2)
    step = maker.step(0)  # 7 sequences: 4 and 3, in micro-batches of 2
    real = [bool(row.any()) for m in step.micros for row in m.token_weights.reshape(2, LENGTH)]
    assert real == [True, True, True, False]
    assert [len(micro.keys) for micro in step.micros] == [2, 1]
    numbers = maker.order.step_indices(0)[1::2]
    keys = [row.tobytes() for row in part.keys[numbers]]
    assert [key for micro in step.micros for key in micro.keys] == keys


def test_what_goes_to_the_device_is_all_of_a_micro_batch_but_its_keys(part) -> None:
    micro = make_micro_batch(part, np.array([4, 1]), ones(2), taught(part))
    names = ["input_ids", "position_ids", "token_weights", "labels", "ids", "log_probs", "log_tail"]
    sent = micro.to(torch.device("cpu"))
    assert list(sent) == list(micro.tensors()) == names
    assert all(value is not None for value in sent.values())
    plain = make_micro_batch(part, np.array([4, 1]), ones(2), None)
    assert [name for name, value in plain.tensors().items() if value is None] == names[4:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory is a GPU's")
def test_micro_batches_for_a_gpu_are_pinned(part) -> None:
    device = torch.device("cuda", 0)
    step = replace(loader(part, taught(part)), pin=device).step(0)
    for micro in step.micros:
        assert all(value.is_pinned() for value in micro.tensors().values() if value is not None)
        for name, value in micro.to(device).items():
            other = micro.tensors()[name]
            assert value is not None and other is not None
            assert torch.equal(value.cpu(), other)


def test_a_step_does_not_depend_on_the_number_of_ranks(part) -> None:
    def keys(world: int, number: int) -> list[tuple[int, ...]]:
        rows = []
        for rank in range(world):
            for micro in loader(part, world=world, rank=rank).step(number).micros:
                real = micro.token_weights.reshape(-1, LENGTH).any(dim=1)
                rows += [tuple(row.tolist()) for row in micro.input_ids[real]]
        return sorted(rows)

    assert keys(1, 3) == keys(2, 3) == keys(3, 3)


def test_steps_start_anywhere(part) -> None:
    """A resumed training reads what the undisturbed one would have read."""
    whole = list(loader(part).steps(0, 5))
    rest = list(loader(part).steps(3, 5))
    assert [step.number for step in whole] == [0, 1, 2, 3, 4]
    for found, expected in zip(rest, whole[3:], strict=True):
        assert found.tokens == expected.tokens
        for a, b in zip(found.micros, expected.micros, strict=True):
            assert (a.input_ids == b.input_ids).all()
            assert (a.token_weights == b.token_weights).all()
    assert list(loader(part).steps(5, 5)) == []


class Order:
    """A schedule that counts the steps it was asked for, and breaks at some step.

    hold: called with each step's number before the step is told.
    """

    def __init__(
        self, hold: Callable[[int], Any] = lambda step: None, broken: int | None = None
    ) -> None:
        self.hold, self.broken = hold, broken
        self.asked = self.told = self.at_once = self.most = 0
        self._lock = threading.Lock()

    def step_epochs(self, step: int) -> np.ndarray:
        return np.zeros(1, np.int64)

    def step_indices(self, step: int) -> np.ndarray:
        with self._lock:
            self.asked += 1
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        self.hold(step)
        with self._lock:
            self.at_once -= 1
            self.told += 1
        if step == self.broken:
            raise KeyError("sequence of step 2 is not in the logit cache")
        return np.array([step])


def test_steps_are_made_ahead_of_time(part, monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr("trainer.training.loader.time", clock)

    def hold(step: int) -> None:
        if step == 0:
            until(lambda: "MainThread" in clock.looks)  # it is waited for
            clock.now += 3

    order = Order(hold)
    waits = []
    steps = replace(loader(part, micro_batch=1), order=order).steps(0, 6, ahead=2)
    for step, told in zip(steps, (3, 4, 5, 6, 6, 6), strict=True):
        waits.append(step.wait_s)
        until(lambda told=told: order.told == told)  # nobody asks meanwhile
    assert waits == [3, 0, 0, 0, 0, 0]


def test_reading_begins_before_the_first_step_is_asked_for(part) -> None:
    """A model is built meanwhile, which takes longer."""
    order = Order()
    with closing(replace(loader(part, micro_batch=1), order=order).steps(0, 6, ahead=3)) as steps:
        until(lambda: order.told == 3)
        assert next(iter(steps)).number == 0


def test_several_steps_are_read_at_once_and_come_in_order(part) -> None:
    """Where reading is waiting for another machine."""
    together = threading.Barrier(4)  # passes only if four are under way
    order = Order(lambda step: together.wait(60))
    maker = replace(loader(part, micro_batch=1), order=order)
    with closing(maker.steps(0, 12, ahead=8, threads=4)) as steps:
        assert [step.number for step in steps] == list(range(12))
    assert order.most == 4


def test_only_so_many_steps_are_held(part) -> None:
    order = Order()
    with closing(replace(loader(part, micro_batch=1), order=order).steps(0, 100, ahead=2)) as steps:
        next(iter(steps))
        until(lambda: order.told >= 3)
        time.sleep(0.1)
        assert order.asked == 3


def test_an_error_of_the_thread_is_raised_where_the_step_is_asked_for(part) -> None:
    with closing(replace(loader(part, micro_batch=1), order=Order(broken=2)).steps(0, 5)) as made:
        steps = iter(made)
        assert next(steps).number == 0 and next(steps).number == 1
        with pytest.raises(KeyError, match="not in the logit cache"):
            next(steps)


def test_the_threads_end_with_their_consumer(part, monkeypatch) -> None:
    closed = threading.Event()
    shutdown = ThreadPoolExecutor.shutdown

    def told(pool: ThreadPoolExecutor, **how: Any) -> None:
        shutdown(pool, **{**how, "wait": False})
        closed.set()
        shutdown(pool, **how)

    monkeypatch.setattr("trainer.training.loader.ThreadPoolExecutor.shutdown", told)
    before = threading.active_count()
    order = Order(lambda step: step == 0 or closed.wait(60))
    steps = replace(loader(part, micro_batch=1), order=order).steps(0, 500, ahead=100, threads=3)
    next(iter(steps))
    steps.close()
    assert threading.active_count() == before
    assert order.asked <= 4


def test_a_sequence_that_was_not_captured_is_an_error_not_a_guess(part, tmp_path) -> None:
    """Falling back to plain cross-entropy with a warning would train something else."""
    empty = CachedTeacher([CacheReader(open_store(tmp_path).sub("empty"), "train")], LENGTH)
    with closing(loader(part, empty).steps(0, 5)) as steps, pytest.raises(KeyError) as caught:
        next(iter(steps))
    assert str(caught.value).endswith("stillhouse run SPEC --redo capture")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_evaluation_reads_every_sequence_once(part, world) -> None:
    keys, tokens, rounds = [], 0.0, set()
    for rank in range(world):
        maker = PartLoader(part, taught(part), 4, rank, world)
        steps = list(maker.steps())
        rounds.add(len(steps))
        assert len(steps) == len(maker)
        for step in steps:
            (micro,) = step.micros
            assert step.tokens == part.loss_tokens.sum()
            keys += micro.keys
            tokens += float(micro.token_weights.sum())
    assert len(rounds) == 1
    assert sorted(keys) == sorted(row.tobytes() for row in part.keys)
    assert tokens == part.loss_tokens.sum()
