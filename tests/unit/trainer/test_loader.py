"""Micro-batches: dealing to ranks, weights, labels, and the thread that makes them ahead."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import open_store
from trainer.corpus import pack, tables
from trainer.corpus.corpus import Part
from trainer.loader import StepLoader, deal, evaluation_batches, make_micro_batch, next_tokens
from trainer.logits.codec import Records
from trainer.logits.store import CacheReader, write_shard
from trainer.schedule import Schedule

LENGTH, K = 8, 3


@pytest.fixture
def part(tmp_path) -> Part:
    """Sequences of documents of different lengths, so of different numbers of loss tokens."""
    draw = np.random.default_rng(1)
    documents = [
        draw.integers(2, 90, size=size).astype(np.int32) for size in draw.integers(2, 14, size=30)
    ]
    packed = pack.pack(documents, LENGTH, "documents", 1)
    store = open_store(tmp_path)
    info = tables.write(store, "train.arrow", packed, np.zeros(len(packed), np.int16))
    return Part(store, {"files": [info.as_dict()]}, LENGTH)


@pytest.fixture
def reader(part, tmp_path) -> CacheReader:
    """Records whose first id is the position, and whose tails say sequence and temperature."""
    cache = open_store(tmp_path).sub("cache")
    keys = [row.tobytes() for row in part.keys]
    ids = np.tile(np.arange(LENGTH, dtype=np.int32)[:, None], (1, K))
    records = [
        Records(
            ids,
            np.full((LENGTH, K), -2.0, np.float32),
            np.stack([np.full(LENGTH, -float(i)), np.full(LENGTH, -100.0 - i)], -1).astype("f4"),
        )
        for i in range(len(keys))
    ]
    order = np.random.default_rng(2).permutation(len(keys))  # storage has an order of its own
    write_shard(cache, "train", [keys[i] for i in order], [records[i] for i in order])
    return CacheReader(cache, "train")


def loader(part: Part, reader: CacheReader | None = None, **how: Any) -> StepLoader:
    values = {"per_step": 7, "steps": 5, "micro_batch": 2, "rank": 0, "world": 1, "tail": 0, **how}
    schedule = Schedule(part.sources, [1.0], 3, values["per_step"], values["steps"])
    return StepLoader(
        part, schedule, reader, values["tail"], values["micro_batch"], values["rank"],
        values["world"],
    )  # fmt: skip


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


def test_positions_are_not_shifted(part, reader) -> None:
    """Labels, records and mask at position t are all about token t + 1."""
    micro = make_micro_batch(part, np.array([4, 1]), 1.0, reader, 0)
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


def test_the_tail_is_of_the_temperature_asked_for(part, reader) -> None:
    micro = make_micro_batch(part, np.array([4]), 1.0, reader, 1)
    assert micro.log_tail is not None
    assert micro.log_tail.tolist() == [-104.0] * LENGTH


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


class Slow:
    """A schedule that takes its time, counts, and breaks at some step."""

    def __init__(self, seconds: float = 0.0, broken: int | None = None) -> None:
        self.seconds, self.broken, self.asked = seconds, broken, 0

    def step_indices(self, step: int) -> np.ndarray:
        self.asked += 1
        time.sleep(self.seconds)
        if step == self.broken:
            raise KeyError("sequence of step 2 is not in the logit cache")
        return np.array([step])


def test_steps_are_made_ahead_of_time(part) -> None:
    maker = replace(loader(part, micro_batch=1), order=Slow(0.05))
    waits = []
    for step in maker.steps(0, 6):
        time.sleep(0.12)  # a training step
        waits.append(step.wait_s)
    assert waits[0] > 0.03
    assert max(waits[2:]) < 0.03


def test_only_so_many_steps_are_held(part) -> None:
    order = Slow()
    steps = replace(loader(part, micro_batch=1), order=order).steps(0, 100, ahead=2)
    next(steps)
    time.sleep(0.3)
    assert order.asked <= 5
    steps.close()


def test_an_error_of_the_thread_is_raised_where_the_step_is_asked_for(part) -> None:
    steps = replace(loader(part, micro_batch=1), order=Slow(broken=2)).steps(0, 5)
    assert next(steps).number == 0 and next(steps).number == 1
    with pytest.raises(KeyError, match="not in the logit cache"):
        next(steps)


def test_the_thread_ends_with_its_consumer(part) -> None:
    before = threading.active_count()
    steps = loader(part).steps(0, 5)
    next(steps)
    steps.close()
    assert threading.active_count() == before


def test_a_sequence_that_was_not_captured_is_an_error_not_a_guess(part, tmp_path) -> None:
    """Falling back to plain cross-entropy with a warning would train something else."""
    empty = CacheReader(open_store(tmp_path).sub("empty"), "train")
    with pytest.raises(KeyError, match="run the capture stage"):
        next(loader(part, empty).steps(0, 5))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_evaluation_reads_every_sequence_once(part, reader, world) -> None:
    keys, tokens, rounds = [], 0.0, set()
    for rank in range(world):
        batches = list(evaluation_batches(part, reader, 0, 4, rank, world))
        rounds.add(len(batches))
        for micro, found in batches:
            keys += found
            tokens += float(micro.token_weights.sum())
    assert len(rounds) == 1
    assert sorted(keys) == sorted(row.tobytes() for row in part.keys)
    assert tokens == part.loss_tokens.sum()
