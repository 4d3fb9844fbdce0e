"""Entropy codes: asymmetric numeral systems with 64-bit states, 32-bit words and static tables.

A symbol of frequency f (of 2^PRECISION) costs PRECISION - log2(f) bits, also where that is no
whole number. The last symbol is coded first. Source: Duda, 2013, Asymmetric numeral systems;
Giesen, 2014, Interleaved entropy coders (two states share one stream of words).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.logits.contexts import inline, jit

PRECISION = 11
SYMBOLS = 128
ESCAPE = SYMBOLS - 1  # stands for a symbol without a code; the symbol follows as plain bits
SYMBOL_BITS = 7
LOW = 1 << 31  # a state is in [LOW, 2^63)


def frequencies(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Frequencies [SYMBOLS] near the weights, summing up to 2^PRECISION; 0 only for weight 0."""
    total = 1 << PRECISION
    present = weights > 0
    exact = weights / weights.sum() * total
    result = np.where(present, np.maximum(np.rint(exact), 1), 0).astype(np.int64)
    while (excess := int(result.sum()) - total) != 0:
        # One at a time where it costs least: bits lost are weight x log2(f / (f - 1)).
        if excess > 0:
            less = np.maximum(result - 1, 1)
            cost = np.where(result > 1, exact * np.log2(np.maximum(result, 1) / less), np.inf)
            result[int(np.argmin(cost))] -= 1
        else:
            gain = np.where(present, exact * np.log2((result + 1) / np.maximum(result, 1)), -1.0)
            result[int(np.argmax(gain))] += 1
    return result


def check_frequencies(freqs: NDArray[np.int64]) -> None:
    """Raises ValueError unless each row [tables, SYMBOLS] is a code with an escape."""
    if (freqs < 0).any() or (freqs.sum(axis=1) != 1 << PRECISION).any():
        raise ValueError("frequencies that make no code")
    if (freqs[:, ESCAPE] < 1).any():
        raise ValueError("a code without an escape")


def _starts(freqs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first slot of each symbol: int64 [tables, SYMBOLS]."""
    return np.cumsum(freqs, axis=1) - freqs


def code_table(freqs: NDArray[np.int64]) -> NDArray[np.uint64]:
    """By symbol: uint64 [tables * SYMBOLS], frequency << 32 | first slot; 0 without a code."""
    codes = (freqs.astype(np.uint64) << np.uint64(32)) | _starts(freqs).astype(np.uint64)
    return np.where(freqs > 0, codes, np.uint64(0)).reshape(-1)


def decode_tables(freqs: NDArray[np.int64]) -> NDArray[np.uint32]:
    """By slot: uint32 [tables * 2^PRECISION], symbol << 24 | (frequency - 1) << 12 | offset."""
    begin = _starts(freqs)
    tables = []
    for row, first in zip(freqs, begin, strict=True):
        symbol = np.repeat(np.arange(SYMBOLS), row)
        offset = np.arange(1 << PRECISION) - first[symbol]
        tables.append((symbol << 24) | ((row[symbol] - 1) << 12) | offset)
    return np.concatenate(tables).astype(np.uint32)


# Everything is counted in uint64: numba makes a float of mixed signs, and takes twice the time
# where an index might be negative.
U = np.uint64
_WORD, _LOW, _PRECISION = U(32), U(LOW), U(PRECISION)
_SLOT = U((1 << PRECISION) - 1)
_TWELVE, _ONE, _TWO = U(0xFFF), U(1), U(2)
_SYMBOL_BITS, _ESCAPE, _BYTE, _WORD_MASK = U(SYMBOL_BITS), U(ESCAPE), U(0xFF), U(0xFFFFFFFF)
_PLAIN, _SPACE, _TABLE = U(255), U(63), U(SYMBOLS)


@inline
def _make_space(state, words, at, limit):  # type: ignore[no-untyped-def]
    """Lets go of a word where the state has reached the limit; words are written downwards."""
    if state >= limit:
        at -= _ONE
        words[at] = np.uint32(state & _WORD_MASK)
        return state >> _WORD, at
    return state, at


@inline
def _put_plain(state, words, at, value, bits):  # type: ignore[no-untyped-def]
    """Pushes `bits` (at most 32) plain bits."""
    state, at = _make_space(state, words, at, _ONE << (_SPACE - bits))
    return (state << bits) | value, at


@jit
def pack(events, state_of, bases, codes, words):  # type: ignore[no-untyped-def]
    """Codes events (see `trainer.logits.encoder`); returns the lowest word used.

    state_of: uint8 [contexts], the state (0 or 1) of each context's symbols; bits without a symbol
    belong to the first. bases: uint64 [contexts], where the table of each starts in `codes`, of
    `code_table`. The states come first, each as two words, the high one first.
    """
    one, two = _LOW, _LOW
    at = U(len(words))
    for i in range(len(events)):
        item = events[len(events) - 1 - i]
        bits = (item >> _WORD) & _BYTE
        symbol = (item >> U(40)) & _BYTE
        context = item >> U(48)
        first = symbol == _PLAIN or state_of[context] == 0
        state = one if first else two
        if bits > U(0):
            state, at = _put_plain(state, words, at, item & _WORD_MASK, bits)
        if symbol != _PLAIN:
            code = codes[bases[context] + symbol]
            if code == U(0):
                state, at = _put_plain(state, words, at, symbol, _SYMBOL_BITS)
                code = codes[bases[context] + _ESCAPE]
            freq = code >> _WORD
            state, at = _make_space(state, words, at, freq << (_SPACE - _PRECISION))
            over = state // freq
            state = (over << _PRECISION) + (state - over * freq) + (code & _WORD_MASK)
        if first:
            one = state
        else:
            two = state
    for state in (two, one):
        words[at - _ONE] = np.uint32(state & _WORD_MASK)
        words[at - _TWO] = np.uint32(state >> _WORD)
        at -= _TWO
    return np.int64(at)


@jit
def opened(words, at):  # type: ignore[no-untyped-def]
    """A state as it was written; 0 where there is none."""
    if at + _TWO > U(len(words)):
        return U(0)
    return (U(words[at]) << _WORD) | U(words[at + _ONE])


@inline
def _refill(state, words, at):  # type: ignore[no-untyped-def]
    """The state after the next word where it is low; zeros after the end, seen by `at`."""
    if state < _LOW:
        word = U(words[at]) if at < U(len(words)) else U(0)
        return (state << _WORD) | word, at + _ONE
    return state, at


@inline
def get_plain(state, words, at, bits):  # type: ignore[no-untyped-def]
    """The next `bits` (at most 32) plain bits."""
    value = state & ((_ONE << bits) - _ONE)
    state, at = _refill(state >> bits, words, at)
    return value, state, at


@inline
def get(state, words, at, tables, base):  # type: ignore[no-untyped-def]
    """The next symbol by the decoding table that starts at `base`."""
    entry = U(tables[base + (state & _SLOT)])
    over = state >> _PRECISION
    state = ((entry >> U(12)) & _TWELVE) * over + over + (entry & _TWELVE)
    state, at = _refill(state, words, at)
    symbol = entry >> U(24)
    if symbol == _ESCAPE:
        return get_plain(state, words, at, _SYMBOL_BITS)
    return symbol, state, at
