"""Symbols as rows of records: the decoder's side of `trainer.logits.contexts`.

The functions return False for a stream that no encoder makes; they never leave their arrays.
"""

from __future__ import annotations

import numpy as np

from trainer.logits.contexts import (
    CENTROIDS,
    COUNT,
    GAP,
    GAP_BITS,
    GAP_LOW,
    OCTAVES,
    TAIL,
    TAIL_LEVELS,
    UNIT,
    VALUE,
    VALUE_BITS,
    VALUE_LOW,
    inline,
    jit,
    tail_bucket,
    tail_mass,
    value_bucket,
)
from trainer.logits.encoder import LOG_TAIL_LOW, LOG_TAIL_STEPS
from trainer.logits.rans import LOW, U, get, get_plain, opened

_LOW, _ZERO, _ONE, _THREE, _NINE = U(LOW), U(0), U(1), U(3), U(9)
_START = U(4)  # words of the two states
_GAP, _VALUE, _CENTROIDS, _UNIT = U(GAP), U(VALUE), U(CENTROIDS), U(UNIT)
_GAPS, _VALUES, _SINGLE = U(len(GAP_LOW)), U(len(VALUE_LOW)), U(16)
_NONE = U(1 << 62)  # a number that no stream may hold
_GAP_LOW, _GAP_BITS = GAP_LOW.astype(np.uint64), GAP_BITS.astype(np.uint64)
_VALUE_LOW, _VALUE_BITS = VALUE_LOW.astype(np.uint64), VALUE_BITS.astype(np.uint64)
_OCTAVES = OCTAVES.astype(np.uint64)


@inline
def _gap(state, words, at, tables, base):  # type: ignore[no-untyped-def]
    """The next gap."""
    symbol, state, at = get(state, words, at, tables, base)
    if symbol >= _GAPS:
        return _NONE, state, at
    value, state, at = get_plain(state, words, at, _GAP_BITS[symbol])
    return _GAP_LOW[symbol] + value, state, at


@inline
def _number(state, words, at, tables, base):  # type: ignore[no-untyped-def]
    """The next value or count."""
    symbol, state, at = get(state, words, at, tables, base)
    if symbol < _SINGLE:
        return symbol, state, at
    if symbol >= _VALUES:
        return _NONE, state, at
    value, state, at = get_plain(state, words, at, _VALUE_BITS[symbol])
    return _VALUE_LOW[symbol] + value, state, at


@jit
def _fill(ids, log_probs, row, count):  # type: ignore[no-untyped-def]
    """Unused slots: the row's first id, with no probability."""
    for j in range(np.int64(count), ids.shape[1]):
        ids[row, j] = ids[row, _ZERO]
        log_probs[row, j] = -np.inf


@jit
def topk_arrays(  # type: ignore[no-untyped-def]
    words, whole, columns, bases, tables, order, step, units, log_values, ids, log_probs, tails
):
    """Rows of a topk record into ids, log_probs and tails.

    words: uint32. whole: ids of every row, or 0 where each row tells. columns: int64, where the
    tails at temperature 1 (-1: nowhere) and at the others go.
    """
    one, two, at = opened(words, _ZERO), opened(words, U(2)), _START
    vocab, width, levels = U(len(order)), U(ids.shape[1]), U(log_values.shape[1])
    per_unit = UNIT / (step * step)
    for row in range(len(ids)):
        level, two, at = get(two, words, at, tables, bases[TAIL])
        if level > U(TAIL_LEVELS):
            return False
        mass = tail_mass(np.int64(level)) if level else 0.0
        if columns[0] >= 0 and level:
            tails[row, columns[0]] = np.log(mass)
        for j in range(1, len(columns)):
            code, one, at = get_plain(one, words, at, _SINGLE)
            if code:
                tails[row, columns[j]] = code / LOG_TAIL_STEPS - LOG_TAIL_LOW
        bucket = tail_bucket(np.int64(level))
        count = U(whole)
        if whole == 0:
            count, two, at = _number(two, words, at, tables, bases[COUNT + bucket])
        if count < _ONE or count > width:
            return False
        unit, log_value = units[bucket], log_values[bucket]
        rest = np.int64(per_unit * (1.0 - mass))
        following, top = _ZERO, _ZERO  # the id before, plus 1, and its bits
        for j in range(np.int64(count)):
            left = count - U(j)
            while following >> top:
                top += _ONE
            base = bases[_GAP + top * _NINE + _OCTAVES[left]]
            gap, one, at = _gap(one, words, at, tables, base)
            number = following + gap
            if number >= vocab:
                return False
            following = number + _ONE
            base = bases[_VALUE + value_bucket(rest, left) * _THREE + min(left, _THREE) - _ONE]
            value, two, at = _number(two, words, at, tables, base)
            if value >= levels:
                return False
            ids[row, j] = order[number]
            log_probs[row, j] = log_value[value]
            rest -= unit[value] if value < _CENTROIDS else np.int64(value * value * _UNIT)
        _fill(ids, log_probs, row, count)
    return at == U(len(words)) and one == _LOW and two == _LOW


@jit
def sample_arrays(  # type: ignore[no-untyped-def]
    words, bases, tables, order, draws, log_values, ids, log_probs
):
    """Rows of a record of draws into ids and log_probs (log of the share of the draws)."""
    one, two, at = opened(words, _ZERO), opened(words, U(2)), _START
    vocab, width = U(len(order)), min(U(ids.shape[1]), U(draws))
    for row in range(len(ids)):
        count, two, at = _number(two, words, at, tables, bases[COUNT])
        if count < _ONE or count > width:
            return False
        rest = U(draws)
        following, top = _ZERO, _ZERO
        for j in range(np.int64(count)):
            left = count - U(j)
            while following >> top:
                top += _ONE
            base = bases[_GAP + top * _NINE + _OCTAVES[left]]
            gap, one, at = _gap(one, words, at, tables, base)
            number = following + gap
            if number >= vocab:
                return False
            following = number + _ONE
            value = rest if left == _ONE else _ONE
            if left > _ONE and rest > left:
                bucket = value_bucket(np.int64(rest * _UNIT), left)
                base = bases[_VALUE + bucket * _THREE + min(left, _THREE) - _ONE]
                value, two, at = _number(two, words, at, tables, base)
                if value < _ONE or value > rest - left + _ONE:
                    return False
            rest -= value
            ids[row, j] = order[number]
            log_probs[row, j] = log_values[value]
        _fill(ids, log_probs, row, count)
    return at == U(len(words)) and one == _LOW and two == _LOW


@jit
def exact_arrays(words, bases, tables, order, halves, ids, log_probs):  # type: ignore[no-untyped-def]
    """Rows of a record for evaluation into ids and log_probs, the most likely id first."""
    one, two, at = opened(words, _ZERO), opened(words, U(2)), _START
    vocab, k = U(len(order)), U(ids.shape[1])
    keys = np.empty(k, np.float32)
    numbers = np.empty(k, np.int64)
    for row in range(len(ids)):
        place, one, at = get_plain(one, words, at, U(12))
        if place >= k:
            return False
        following, top = _ZERO, _ZERO
        for j in range(np.int64(k)):
            while following >> top:
                top += _ONE
            base = bases[_GAP + top * _NINE + _OCTAVES[k - U(j)]]
            gap, one, at = _gap(one, words, at, tables, base)
            number = following + gap
            if number >= vocab:
                return False
            following = number + _ONE
            half, one, at = get_plain(one, words, at, _SINGLE)
            numbers[j] = order[number]
            keys[j] = -halves[half]
        highest = keys[place]
        keys[place] = -np.inf  # halves may tie; the place tells which id comes first
        likely = np.argsort(keys, kind="mergesort")
        keys[place] = highest
        for j in range(np.int64(k)):
            ids[row, j] = numbers[likely[j]]
            log_probs[row, j] = -keys[likely[j]]
    return at == U(len(words)) and one == _LOW and two == _LOW
