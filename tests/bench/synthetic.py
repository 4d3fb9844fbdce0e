"""Synthetic next-token distributions, like a language model's, over a vocabulary of 151,936.

At each position, with u, u' uniform on [0, 1]: logit(rank) = -a ln(rank + offset) + 0.6 N(0, 1) for
the ranks 1, 2, ..., where a = 1.15 + 2.6 u^1.3 and offset = exp(4 u' - 3). Confident and uncertain
positions both occur. Which id has which rank: "uniform", all orders
equally likely, the worst case for a codec; or "ordered", Plackett-Luce with weights 1 / (id + 1),
as if ids were numbered by how often they occur.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

VOCAB = 151_936
Ids = Literal["uniform", "ordered"]

# Positions that share a random generator: the result does not depend on the number of threads.
_CHUNK = 64


@dataclass(frozen=True)
class Positions:
    """Exact distributions, as far as a cache's records need them.

    ids: int32 [count, k], most likely first, with their log_probs, float64 [count, k]; log_tail:
    float64 [count], log of the mass of all other ids; entropy: float64 [count], in nats, over
    all ids; draws: int32 [count, draws], ids drawn with replacement, ascending. vocab: number of
    ids.
    """

    ids: NDArray[np.int32]
    log_probs: NDArray[np.float64]
    log_tail: NDArray[np.float64]
    entropy: NDArray[np.float64]
    draws: NDArray[np.int32]
    vocab: int = VOCAB

    def rows(self, start: int, stop: int) -> Positions:
        """The positions from `start` to `stop`."""
        cut = {name: getattr(self, name)[start:stop] for name in FIELDS}
        return replace(self, **cut)

    def top(self, k: int) -> Positions:
        """The same with the k most likely ids only; the others are in the tail."""
        more = np.exp(self.log_probs[:, k:]).sum(axis=1)
        log_tail = np.log(np.exp(self.log_tail) + more)
        return replace(
            self, ids=self.ids[:, :k], log_probs=self.log_probs[:, :k], log_tail=log_tail
        )


FIELDS = ("ids", "log_probs", "log_tail", "entropy", "draws")


def positions(
    count: int,
    ids: Ids = "uniform",
    k: int = 128,
    draws: int = 50,
    seed: int = 0,
) -> Positions:
    """`count` positions; settings of `ids` differ in the ids alone, not in the distributions."""

    def chunk(start: int) -> Positions:
        stop = min(start + _CHUNK, count)
        shapes = np.random.default_rng([seed, start, 2]).random((stop - start, 2))
        return _chunk(shapes, ids, k, draws, (seed, start))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(chunk, range(0, count, _CHUNK)))
    return Positions(*(np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS))


def _chunk(
    shapes: NDArray[np.float64], ids: Ids, k: int, draws: int, seed: tuple[int, int]
) -> Positions:
    count = len(shapes)
    rng = np.random.default_rng([*seed, 0])
    order = np.random.default_rng([*seed, 1])
    exponent = 1.15 + 2.6 * shapes[:, 0] ** 1.3
    offset = np.exp(4 * shapes[:, 1] - 3)
    uniforms = rng.random((count, draws))
    ranks = np.arange(1, VOCAB + 1, dtype=np.float32)
    rows = [
        _row(
            -np.float32(exponent[i]) * np.log(ranks + np.float32(offset[i]))
            + np.float32(0.6) * rng.standard_normal(VOCAB, dtype=np.float32),
            k,
            uniforms[i],
            _numbering(ids, order),
        )
        for i in range(count)
    ]
    return Positions(*(np.stack(column) for column in zip(*rows, strict=True)))


def _row(
    logits: NDArray[np.float32],
    k: int,
    uniforms: NDArray[np.float64],
    numbering: NDArray[np.int32],
) -> tuple[Any, ...]:
    """One position: ids, log_probs, log_tail, entropy, draws."""
    exact = logits.astype(np.float64)
    exact -= exact.max()
    weights = np.exp(exact)
    upto = np.cumsum(weights)
    log_total = np.log(upto[-1])
    entropy = log_total - weights @ exact / upto[-1]
    drawn = np.searchsorted(upto, uniforms * upto[-1], side="right")
    threshold = np.partition(logits, VOCAB - k)[VOCAB - k]
    kept = np.flatnonzero(logits >= threshold)
    kept = kept[np.argsort(-logits[kept], kind="stable")][:k]
    log_probs = exact[kept] - log_total
    weights[kept] = 0.0
    log_tail = np.log(weights.sum()) - log_total
    return numbering[kept], log_probs, log_tail, entropy, np.sort(numbering[drawn])


def _numbering(ids: Ids, rng: np.random.Generator) -> NDArray[np.int32]:
    """int32 [VOCAB]: the id of each rank."""
    # An exponential race: sorted arrival times with rates w are in Plackett-Luce order.
    times = rng.standard_exponential(VOCAB, dtype=np.float32)
    if ids == "ordered":
        times *= np.arange(1, VOCAB + 1, dtype=np.float32)
    # Positive floats sort like their bits; bits and id in one number sort faster than an argsort.
    keys = times.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(VOCAB, dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int32)
