"""One sequence's teacher records as bytes, and back. Pure functions on arrays; no Python per row.

Layout (little-endian): a head (version, method, width of the widest row, positions), then one bit
stream over all rows in 32-bit words, as `trainer.logits.contexts` describes it, coded by the
cache's codebook. Records for evaluation end with their tails, entropies and true log-probabilities
as float32. Checksums are the store's business; still, arbitrary bytes raise ValueError or give
wrong records, and never read or write outside of their arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.logits.codebook import Codebook
from trainer.logits.contexts import STATE_OF
from trainer.logits.decoder import exact_arrays, sample_arrays, topk_arrays
from trainer.logits.encoder import exact_rows, sample_rows, topk_rows
from trainer.logits.rans import pack
from trainer.logits.records import VERSION, Coding, Draws, Records

_HEAD = struct.Struct("<BBHI")  # version, method, width, positions
_METHODS = {"topk": 0, "sample": 1, "exact": 2}
_ALL = 128  # in the method's byte: every row has all k ids
# What a stream may claim to hold: a row takes 1/1024 of a bit at least, as no symbol has more than
# 2,047 of 2,048 slots; and of sequences of unknown length no more than so much.
_ROWS_PER_BIT = 1024
_MOST_POSITIONS, _MOST_ENTRIES = 1 << 22, 1 << 28
_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def error_bound(log_probs: NDArray[np.float32], coding: Coding) -> NDArray[np.float32]:
    """Largest error of a decoded record: of the log-probability ("exact": half a unit of
    float16's last place), or of the root of the probability ("topk": both ends of a step)."""
    if coding.method == "exact":
        return np.maximum(np.abs(log_probs) * np.float32(2.0**-11), np.float32(2.0**-25))
    return np.full(log_probs.shape, coding.step, np.float32)


def others(coding: Coding) -> list[int]:
    """Which of the temperatures are not 1; their tails are coded each by itself."""
    return [i for i, temperature in enumerate(coding.temperatures) if temperature != 1.0]


def events_of(item: Records | Draws, book: Codebook) -> tuple[NDArray[np.uint64], int, bool]:
    """The rows as events of `trainer.logits.encoder`, the ids of the widest row, and whether all
    rows have all ids, so that their numbers are not told.

    Raises ValueError for wrong ids or NaN.
    """
    coding = book.coding
    rows, width = item.ids.shape
    if isinstance(item, Draws):
        if coding.method != "sample" or width != coding.k:
            raise ValueError(f"{width} draws for records of {coding.k} by {coding.method}")
        events = np.empty(rows * (2 + 2 * width), np.uint64)
        count, widest = sample_rows(item.ids, book.ranks, events)
        return _checked(events, count, item.ids), widest, False
    if coding.method == "sample" or width > coding.k:
        raise ValueError(f"{width} ids a row for records of {coding.k} by {coding.method}")
    ids = np.ascontiguousarray(item.ids, np.int64)
    if coding.method == "exact":
        halves = item.log_probs.astype(np.float16)
        if np.isnan(halves).any():
            raise ValueError("NaN among the teacher's log-probabilities")
        events = np.empty(rows * (2 + 2 * width), np.uint64)
        count, widest = exact_rows(ids, halves.view(np.uint16), book.ranks, events)
        return _checked(events, count, ids), widest, False
    full = coding.keep == 0 and width == coding.k and not np.isneginf(item.log_probs).any()
    temperatures = others(coding)
    if np.isnan(item.log_tails).any():
        raise ValueError("NaN among the teacher's tails")
    if 1.0 in coding.temperatures:
        tails = item.log_tails[:, coding.temperatures.index(1.0)].astype(np.float64)
        masses = np.where(np.isneginf(tails), -1.0, np.exp(tails))
    else:
        masses = 1.0 - np.exp(item.log_probs.astype(np.float64)).sum(axis=1)
        masses = np.where(masses <= 0, -1.0, masses)
    events = np.empty(rows * (2 + len(temperatures) + 2 * width), np.uint64)
    count, widest = topk_rows(
        ids,
        np.ascontiguousarray(item.log_probs, np.float32),
        masses,
        np.ascontiguousarray(item.log_tails[:, temperatures], np.float32),
        np.array([coding.temperatures[i] for i in temperatures], np.float64),
        book.ranks,
        coding.step,
        coding.keep,
        book.units,
        full,
        events,
    )
    return _checked(events, count, ids), widest, bool(full)


def _checked(events: NDArray[np.uint64], count: int, ids: NDArray) -> NDArray[np.uint64]:
    if count < 0:
        raise ValueError(
            f"position {-count - 1}: ids {ids[-count - 1][:8].tolist()}.. outside of the "
            "vocabulary, repeated, or with a log-probability that is none"
        )
    return events[:count]


def encode(item: Records | Draws, book: Codebook) -> bytes:
    """The bytes of one sequence. Raises ValueError for NaN, for ids that repeat in a row or are
    outside of the vocabulary, and for too many positions."""
    coding = book.coding
    if len(item.ids) > _MOST_POSITIONS:
        raise ValueError(f"{len(item.ids)} positions in a sequence; may be {_MOST_POSITIONS}")
    events, width, full = events_of(item, book)
    rows = len(item.ids)
    words = np.empty(2 * len(events) + 4, np.uint32)
    lowest = pack(events, STATE_OF, book.code_bases, book.codes, words)
    head = _HEAD.pack(VERSION, _METHODS[coding.method] | _ALL * full, width, rows)
    parts = [head, words[lowest:].astype("<u4").tobytes()]
    if coding.method == "exact":
        assert isinstance(item, Records)
        if item.entropy is None or item.true_log_prob is None:
            raise ValueError("records for evaluation need entropy and true_log_prob")
        for values in (item.log_tails[:, 0], item.entropy, item.true_log_prob):
            if np.isnan(values).any():
                raise ValueError("NaN in a record for evaluation")
            parts.append(values.astype("<f4").tobytes())
    return b"".join(parts)


def decode(data: bytes | memoryview, book: Codebook) -> Records:
    """The records in `data`. Raises ValueError when it is no record of this codebook."""
    return decode_many([data], book)


def decode_many(
    blobs: Sequence[bytes | memoryview],
    book: Codebook,
    length: int | Sequence[int] | None = None,
) -> Records:
    """The records of several sequences, one after the other along the positions; the width is
    that of the widest row.

    length: positions of every sequence, or of each one, where that is known. Raises ValueError
    when a blob is no record of this codebook, or of another length.
    """
    heads = [_head(blob, book.coding) for blob in blobs]
    rows = sum(head[1] for head in heads)
    width = max((head[0] for head in heads), default=1)
    if length is not None:
        lengths = [length] * len(heads) if isinstance(length, int) else length
        for (_, found, _), wanted in zip(heads, lengths, strict=True):
            if found != wanted:
                raise ValueError(f"a record of {found} positions; its sequence has {wanted}")
    if length is None and rows * width > _MOST_ENTRIES:
        raise ValueError(f"a record of {rows} x {width} ids; too many to be true")
    coding = book.coding
    ids = np.empty((rows, width), np.int64)
    log_probs = np.empty((rows, width), np.float32)
    columns = 1 if coding.method != "topk" else len(coding.temperatures)
    tails = np.full((rows, columns), -np.inf, np.float32)
    exact = [np.empty(rows, np.float32) for _ in range(2 * (coding.method == "exact"))]
    at = 0
    for blob, (_, count, everything) in zip(blobs, heads, strict=True):
        here = slice(at, at + count)
        at += count
        body = np.frombuffer(blob, np.uint8, offset=_HEAD.size)
        if coding.method == "exact":
            floats = body[len(body) - 12 * count :].copy().view("<f4").reshape(3, count)
            tails[here, 0], exact[0][here], exact[1][here] = floats
            body = body[: len(body) - 12 * count]
        words = body.copy().view("<u4")
        if coding.method == "topk":
            whole = coding.k if everything else 0
            good = topk_arrays(
                words, whole, others_first(coding), book.bases, book.tables, book.order,
                coding.step, book.units, book.log_values, ids[here], log_probs[here], tails[here],
            )  # fmt: skip
        elif coding.method == "sample":
            good = sample_arrays(
                words, book.bases, book.tables, book.order, coding.k, book.log_values[0],
                ids[here], log_probs[here],
            )  # fmt: skip
        else:
            good = exact_arrays(
                words, book.bases, book.tables, book.order, _HALVES, ids[here], log_probs[here]
            )
        if not good:
            raise ValueError("a record that its codebook cannot read")
    if coding.method == "exact":
        return Records(ids, log_probs, tails, exact[0], exact[1])
    return Records(ids, log_probs, tails)


def others_first(coding: Coding) -> NDArray[np.int64]:
    """Columns of the tails in the order of the stream: temperature 1 (or -1), then the others."""
    one = coding.temperatures.index(1.0) if 1.0 in coding.temperatures else -1
    return np.array([one, *others(coding)], np.int64)


def _head(data: bytes | memoryview, coding: Coding) -> tuple[int, int, bool]:
    """Width, positions and whether all rows have all ids. Raises ValueError for impossible ones."""
    if len(data) < _HEAD.size:
        raise ValueError("a record that is cut short")
    version, method, width, rows = _HEAD.unpack_from(data)
    if version != VERSION or method & ~_ALL != _METHODS[coding.method]:
        raise ValueError(
            f"a record of version {version} and method {method & ~_ALL}; "
            f"expected {VERSION} and {_METHODS[coding.method]}"
        )
    everything = bool(method & _ALL)
    size = len(data) - _HEAD.size
    tails = 12 * rows if coding.method == "exact" else 0
    fits = 1 <= width <= coding.k and tails <= size
    fits = fits and rows <= min(_MOST_POSITIONS, 8 * size * _ROWS_PER_BIT)
    if not fits or (size - tails) % 4 or (everything and width != coding.k):
        raise ValueError(f"a record of {rows} x {width} ids in {len(data)} bytes")
    return width, rows, everything
