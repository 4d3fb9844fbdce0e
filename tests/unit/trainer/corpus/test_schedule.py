"""The order of training: against counting, over resumes, ends of epochs and weights."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.corpus.schedule import Schedule, shuffle


def make(counts=(10,), weights=None, seed=3, per_step=4, steps=20, most=None) -> Schedule:
    sources = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    return Schedule(sources, weights or [1.0] * len(counts), seed, per_step, steps, most)


def stream(schedule: Schedule) -> np.ndarray:
    return np.concatenate([schedule.step_indices(step) for step in range(schedule.steps)])


def test_an_epoch_reads_every_sequence_once() -> None:
    read = stream(make((10,), per_step=4, steps=20))
    for epoch in range(8):
        assert sorted(read[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert read[:10].tolist() != read[10:20].tolist()


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.lists(st.sampled_from([0.05, 0.5, 1.0, 1.5, 2.0, 3.25]), min_size=3, max_size=3),
    st.integers(1, 9),
    st.integers(1, 12),
    st.one_of(st.none(), st.integers(1, 60)),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_any_step_without_the_ones_before_it(counts, weights, per_step, steps, most, random):
    """A resume at any step needs no replay, whatever was asked before."""
    settings_ = {"weights": weights[: len(counts)], "per_step": per_step, "steps": steps}
    expected = stream(make(counts, most=most, **settings_))
    other = make(counts, most=most, **settings_)
    order = list(range(steps))
    random.shuffle(order)
    for step in order:
        found = other.step_indices(step)
        assert found.dtype == np.int64
        assert found.tolist() == expected[step * per_step : (step + 1) * per_step].tolist()
    assert other.used().tolist() == sorted(set(expected.tolist()))
    if most is not None:
        assert len(other.used()) <= max(most, 1) or most >= sum(counts)


@pytest.mark.parametrize("most", [None, 7])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, 0.5]])
def test_epochs_of_a_step_are_those_of_its_sequences(weights, most) -> None:
    """By counting: an epoch is so many numbers of the stream, its odd ones a sequence more."""
    schedule = make((6, 4), weights, per_step=4, steps=30, most=most)
    sizes = [7] * 30 if most else [round(6 * weights[0] + 4 * weights[1])] * 30
    expected = np.repeat(np.arange(30), sizes)[: 4 * 30]
    found = [schedule.step_epochs(step) for step in range(30)]
    assert all(epochs.dtype == np.int64 and epochs.shape == (4,) for epochs in found)
    assert np.concatenate(found).tolist() == expected.tolist()
    assert make((6, 4), weights, per_step=4, steps=30, most=most).step_epochs(17).tolist() == (
        found[17].tolist()
    )


def test_a_source_may_be_absent_from_an_epoch() -> None:
    epochs = make((4,), [0.1], per_step=1, steps=3).step_epochs
    assert [epochs(step).tolist() for step in range(3)] == [[2], [4], [7]]


class Slow(dict):
    """A dictionary that lets other threads go on after it was looked at."""

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        time.sleep(0.001)
        return found


def test_threads_may_ask_at_once() -> None:
    """Two epochs are kept; one that was just found must not be dropped before it is read."""
    schedule, alone = make((5,), per_step=3, steps=40), make((5,), per_step=3, steps=40)
    schedule._epochs = Slow()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(schedule.step_indices, range(40)))
    for step, read in enumerate(found):
        assert read.tolist() == alone.step_indices(step).tolist()


def test_weights_are_how_often_a_source_is_read() -> None:
    weights = [2.0, 0.5, 1.25, 0.01]
    counts = [8, 8, 8, 8]
    per_epoch = [16, 4, 10, 0.08]
    epochs = 100
    total = round(sum(per_epoch) * epochs)
    times = Counter(stream(make(counts, weights, per_step=1, steps=total)).tolist())
    for source, weight in enumerate(weights):
        reads = [times[8 * source + i] for i in range(8)]
        assert sum(reads) == pytest.approx(8 * weight * epochs, abs=16)
        assert max(reads) - min(reads) <= 2  # every sequence of a source equally often


def test_a_weight_of_a_half_reads_each_once_in_two_epochs() -> None:
    read = stream(make((10,), [0.5], per_step=5, steps=4))
    assert sorted(read[:10]) == list(range(10)) == sorted(read[10:])


def test_the_pool_is_the_beginning_of_the_unlimited_order() -> None:
    free = stream(make((50,), per_step=5, steps=10))
    limited = stream(make((50,), per_step=5, steps=10, most=15))
    assert limited[:15].tolist() == free[:15].tolist()
    for repeat in range(1, 3):
        again = limited[15 * repeat : 15 * repeat + 15]
        assert sorted(again) == sorted(free[:15])
        assert again.tolist() != free[:15].tolist()
    assert make((50,), per_step=5, steps=10, most=15).used().tolist() == sorted(free[:15])
    assert stream(make((50,), per_step=5, steps=10, most=50)).tolist() == free.tolist()


def test_used_stops_where_the_steps_stop() -> None:
    schedule = make((100,), per_step=4, steps=3)
    assert len(schedule.used()) == 12
    assert make((100,), per_step=4, steps=30_000_000).used().tolist() == list(range(100))


def test_the_seed_changes_the_order_and_nothing_else_does() -> None:
    assert stream(make(seed=1)).tolist() != stream(make(seed=2)).tolist()
    assert stream(make(seed=2**32 - 1)).tolist() == stream(make(seed=2**32 - 1)).tolist()


def test_the_shuffle_is_frozen() -> None:
    """A run that resumes with another NumPy must go on in the same order."""
    assert shuffle(8, 17, 0, 0).tolist() == [6, 0, 4, 5, 3, 2, 7, 1]
    raw = np.random.Philox(np.random.SeedSequence((17, 0, 0))).random_raw(8)
    assert sorted(shuffle(8, 17, 0, 0)) == list(range(8))
    assert (np.diff(raw[shuffle(8, 17, 0, 0)].astype(object)) > 0).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"counts": (0,)}, "no sequences"),
        ({"counts": (2, 2), "weights": [1.0]}, "weight above 0"),
        ({"weights": [0.0]}, "weight above 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"per_step": 0}, "sequences_per_step"),
        ({"most": 0}, "max_sequences"),
    ],
)
def test_refuses_what_cannot_be_read(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_step_outside_of_the_training_is_an_error() -> None:
    with pytest.raises(IndexError):
        make(steps=3).step_indices(3)
    with pytest.raises(IndexError):
        make(steps=3).step_indices(-1)
