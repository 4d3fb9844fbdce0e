"""Rows of records as symbols: the encoder's side of `trainer.logits.contexts`.

An event is one uint64: plain bits (32), their number (8), symbol (8), context (16); the symbol
PLAIN has no code, only its plain bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.logits.contexts import (
    CENTROIDS,
    COUNT,
    GAP_BITS,
    GAP_LOW,
    TAIL,
    UNIT,
    VALUE_BITS,
    VALUE_LOW,
    gap_class,
    gap_context,
    jit,
    octave,
    tail_bucket,
    tail_level,
    tail_mass,
    value_class,
    value_context,
)

PLAIN = 255
# Log tails at other temperatures than 1: 16 bits, steps of 1/512 nats from -64 on; 0 is no tail.
LOG_TAIL_STEPS, LOG_TAIL_LOW = 512.0, 64.0
_MANY = 96  # ids from which on a library sort beats insertion


@jit
def event(context: int, symbol: int, bits: int, plain: int) -> np.uint64:
    """One event."""
    return np.uint64(
        (np.int64(context) << 48) | (np.int64(symbol) << 40) | (np.int64(bits) << 32) | plain
    )


@jit
def _sort(keys: NDArray[np.int64], count: int) -> None:
    """Sorts the first `count` keys in place."""
    if count >= _MANY:
        keys[:count] = np.sort(keys[:count])
        return
    for i in range(1, count):
        key = keys[i]
        j = i - 1
        while j >= 0 and keys[j] > key:
            keys[j + 1] = keys[j]
            j -= 1
        keys[j + 1] = key


@jit
def _number(events, at, context, value):  # type: ignore[no-untyped-def]
    """A value or a count as an event at `at`."""
    symbol = value_class(value)
    events[at] = event(context, symbol, VALUE_BITS[symbol], value - VALUE_LOW[symbol])


@jit
def _gap(events, at, number, before, left):  # type: ignore[no-untyped-def]
    gap = number - before - 1
    symbol = gap_class(gap)
    context = gap_context(octave(before + 1), left)
    events[at] = event(context, symbol, GAP_BITS[symbol], gap - GAP_LOW[symbol])


@jit
def topk_rows(  # type: ignore[no-untyped-def]
    ids, log_probs, masses, log_tails, temperatures, ranks, step, keep, centroids, full, events
):
    """Events of topk rows; returns how many and the widest row, or minus the first wrong row
    minus 1 and 0.

    ids: int64 [rows, k]. log_probs: float32 [rows, k]. masses: float64 [rows], of the tail at
    temperature 1; below 0: there is none. log_tails: float32 [rows, others], at the other
    `temperatures` [others]. ranks: int32 [vocab]. centroids: int64 [tail buckets, CENTROIDS],
    units. full: whether every row has all k ids, so their number is not told. Ids that are
    dropped join the tails.
    """
    at = widest = 0
    rows, k = ids.shape
    keys = np.empty(k, np.int64)
    levels = np.empty(k, np.int64)
    per_unit = UNIT / (step * step)
    dropped = np.empty(len(temperatures), np.float64)
    for row in range(rows):
        count = 0
        first = 0
        mass = 0.0
        dropped[:] = 0.0
        for j in range(k):
            if ids[row, j] < 0 or ids[row, j] >= len(ranks) or not log_probs[row, j] <= 1e-3:
                return -row - 1, 0
            if log_probs[row, j] > log_probs[row, first]:
                first = j
        for j in range(k):
            root = np.exp(0.5 * log_probs[row, j])
            kept = root > 0.0 and root >= keep * step
            if kept or j == first or full:
                levels[j] = int(np.rint(root / step))
                keys[count] = (np.int64(ranks[ids[row, j]]) << 16) | j
                count += 1
            elif root > 0.0:
                mass += root * root
                for other in range(len(temperatures)):
                    dropped[other] += np.exp(log_probs[row, j] / temperatures[other])
        _sort(keys, count)
        widest = max(widest, count)
        level = 0
        if masses[row] >= 0.0 or mass > 0.0:
            level = tail_level(max(masses[row], 0.0) + mass)
        bucket = tail_bucket(level)
        events[at] = event(TAIL, level, 0, 0)
        at += 1
        for j in range(log_tails.shape[1]):
            value = np.float64(log_tails[row, j])
            if dropped[j] > 0.0:
                value = np.logaddexp(value, np.log(dropped[j]))
            plain = 0
            if value > -np.inf:
                plain = int(np.rint((value + LOG_TAIL_LOW) * LOG_TAIL_STEPS))
                plain = min(max(plain, 1), 65535)
            events[at] = event(0, PLAIN, 16, plain)
            at += 1
        if not full:
            _number(events, at, COUNT + bucket, count)
            at += 1
        rest = np.int64(per_unit * (1.0 - (tail_mass(level) if level else 0.0)))
        before = -1
        for j in range(count):
            number = keys[j] >> 16
            value = levels[keys[j] & 0xFFFF]
            if number == before:
                return -row - 1, 0
            _gap(events, at, number, before, count - j)
            _number(events, at + 1, value_context(rest, count - j), value)
            at += 2
            rest -= centroids[bucket, value] if value < CENTROIDS else value * value * UNIT
            before = number
    return at, widest


@jit
def sample_rows(draws, ranks, events):  # type: ignore[no-untyped-def]
    """Events of rows of draws (int32 [rows, draws]); returns as `topk_rows`. The last count is not
    told, as it is what is left; nor are counts that must be 1."""
    at = widest = 0
    rows, total = draws.shape
    keys = np.empty(total, np.int64)
    for row in range(rows):
        for j in range(total):
            if draws[row, j] < 0 or draws[row, j] >= len(ranks):
                return -row - 1, 0
            keys[j] = ranks[draws[row, j]]
        _sort(keys, total)
        count = 1
        for j in range(1, total):
            count += keys[j] != keys[j - 1]
        widest = max(widest, count)
        _number(events, at, COUNT, count)
        at += 1
        before, rest, j = -1, total, 0
        for left in range(count, 0, -1):
            number = keys[j]
            start = j
            while j < total and keys[j] == number:
                j += 1
            _gap(events, at, number, before, left)
            at += 1
            if left > 1 and rest > left:
                _number(events, at, value_context(rest * UNIT, left), j - start)
                at += 1
            rest -= j - start
            before = number
    return at, widest


@jit
def exact_rows(ids, halves, ranks, events):  # type: ignore[no-untyped-def]
    """Events of rows for evaluation; returns as `topk_rows`.

    ids: int64 [rows, k], most likely first. halves: uint16 [rows, k], the bits of float16
    log-probabilities, told as they are. First comes the place of the most likely id.
    """
    at = 0
    rows, k = ids.shape
    keys = np.empty(k, np.int64)
    for row in range(rows):
        for j in range(k):
            if ids[row, j] < 0 or ids[row, j] >= len(ranks):
                return -row - 1, 0
            keys[j] = (np.int64(ranks[ids[row, j]]) << 16) | j
        _sort(keys, k)
        place = 0
        while keys[place] & 0xFFFF:
            place += 1
        events[at] = event(0, PLAIN, 12, place)
        at += 1
        before = -1
        for j in range(k):
            number = keys[j] >> 16
            if number == before:
                return -row - 1, 0
            _gap(events, at, number, before, k - j)
            events[at + 1] = event(0, PLAIN, 16, halves[row, keys[j] & 0xFFFF])
            at += 2
            before = number
    return at, k
