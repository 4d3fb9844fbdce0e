"""Fits a codebook to the first records of a cache: the numbering of ids, code tables, levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.logits.codebook import Codebook, check_coding
from trainer.logits.codec import events_of
from trainer.logits.contexts import (
    CENTROIDS,
    CONTEXTS,
    COUNT,
    GAP,
    TAIL,
    TAIL_BUCKETS,
    VALUE,
    tail_buckets,
)
from trainer.logits.rans import ESCAPE, SYMBOLS, frequencies
from trainer.logits.records import Coding, Draws, Records

# Symbols a context must have shown to get a code of its own; fewer share one with their like.
_ENOUGH = 128
# How many symbols the shared code counts for in a context's own.
_PRIOR = 24.0
# Tokens that a fit looks at, at most.
_FIT_ROWS = 32_768


def fit_codebook(
    coding: Coding, sample: Sequence[Records | Draws], token_counts: NDArray[Any] | None = None
) -> Codebook:
    """The codebook for records like `sample`; a pure function of its arguments.

    token_counts: [vocab], how often each id occurs; ids are numbered by it (None: as they
    are). Raises ValueError for records that could not be coded.
    """
    check_coding(coding)
    order = np.arange(coding.vocab, dtype=np.int32)
    if token_counts is not None:
        counts = np.zeros(coding.vocab, np.int64)
        counts[: len(token_counts)] = token_counts[: coding.vocab]
        order = np.argsort(-counts, kind="stable").astype(np.int32)
    plain = Codebook(
        coding,
        order,
        _fit_centroids(coding, sample),
        np.zeros(CONTEXTS, np.int64),
        frequencies(np.eye(SYMBOLS)[ESCAPE])[None],
    )
    seen = np.zeros((CONTEXTS, 256), np.int64)
    rows = 0
    for item in sample:
        if rows >= _FIT_ROWS:
            break
        rows += len(item.ids)
        events, *_ = events_of(item, plain)
        flat = (events >> np.uint64(40)).astype(np.int64)  # context and symbol
        seen += np.bincount(flat, minlength=CONTEXTS * 256).reshape(CONTEXTS, 256)
    table_of, freqs = _fit_tables(seen[:, :SYMBOLS].astype(np.float64))
    return Codebook(coding, order, plain.centroids, table_of, freqs)


def _fit_centroids(coding: Coding, sample: Sequence[Records | Draws]) -> NDArray[np.float64]:
    """Mean probability of each level and tail bucket: what minimises the generalized KL."""
    levels = np.arange(CENTROIDS)
    plain = (np.maximum(levels, 0.25) * coding.step) ** 2
    if coding.method != "topk":
        return np.repeat(plain[None], TAIL_BUCKETS, axis=0)
    sums = np.zeros((TAIL_BUCKETS, CENTROIDS))
    numbers = np.zeros((TAIL_BUCKETS, CENTROIDS))
    rows = 0
    for item in sample:
        assert isinstance(item, Records)
        if rows >= _FIT_ROWS:
            break
        rows += len(item.ids)
        p = np.exp(item.log_probs.astype(np.float64))
        root = np.sqrt(p)
        kept = (p > 0) & (root >= coding.keep * coding.step)
        mass = 1.0 - np.where(kept, p, 0.0).sum(axis=1)
        buckets = tail_buckets(mass)
        level = np.rint(root / coding.step).astype(np.int64)
        used = kept & (level < CENTROIDS)
        where = (np.broadcast_to(buckets[:, None], level.shape)[used], level[used])
        np.add.at(sums, where, p[used])
        np.add.at(numbers, where, 1.0)
    # A few nominal values in each cell, so that rare ones stay near the middle of their level.
    shared = (sums.sum(axis=0) + 2 * plain) / (numbers.sum(axis=0) + 2)
    return (sums + 4 * shared) / (numbers + 4)


def _fit_tables(seen: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Codes of the contexts by what each has shown [CONTEXTS, SYMBOLS]; rare ones share."""
    table_of = np.zeros(CONTEXTS, np.int64)
    tables: list[NDArray[np.int64]] = []

    def add(weights: NDArray[np.float64]) -> int:
        weights = weights.copy()
        weights[ESCAPE] = max(1.0, float((weights == 1).sum()))
        tables.append(frequencies(weights))
        return len(tables) - 1

    for start, stop, width in (
        (TAIL, COUNT, 1),
        (COUNT, GAP, TAIL_BUCKETS),
        (GAP, VALUE, 9),
        (VALUE, CONTEXTS, 3),
    ):
        every = seen[start:stop].sum(axis=0)
        shared = add(every)
        for first in range(start, stop, width):
            family = seen[first : first + width].sum(axis=0)
            near, likely = shared, every
            if family.sum() >= _ENOUGH:
                near, likely = add(family), family
            for context in range(first, first + width):
                table_of[context] = near
                if _ENOUGH <= seen[context].sum() < family.sum():
                    prior = _PRIOR * likely / likely.sum()
                    table_of[context] = add(seen[context] + np.where(prior > 0.02, prior, 0.0))
    return table_of, np.stack(tables)
