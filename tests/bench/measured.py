"""Bytes and errors of exact distributions after a way through a cache on disk.

Two errors, because keeping fewer ids lowers the one and raises the other:
- the generalized KL of the kept part, over the ids that a record has: sum of p log(p/q) - p + q;
- the full KL, over all ids, where the record's tail is spread evenly over the ids that it does not
  have: what is lost by quantization and truncation together. Of the exact top-k it is the
  truncation alone.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.storage import open_store
from tests.bench.synthetic import Positions
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import encode
from trainer.logits.reader import CacheReader
from trainer.logits.records import Coding, Draws, Records
from trainer.logits.store import IDENTITY, open_cache, publish_codebook, write_shard

LENGTH = 2048  # positions in a sequence
FIT = 2  # sequences from which the codebook is made; they are not measured


@dataclass(frozen=True)
class Figures:
    """Per position: bytes on disk, ids that a record has, both errors in nats (None: of draws),
    and the bytes of the codebook, which `bytes` has its share of."""

    bytes: float
    ids: float
    gkl: float | None = None
    kl_full: float | None = None
    codebook: int = 0

    @property
    def plain(self) -> dict[str, Any]:
        """For a JSON file."""
        return {name: round(value, 5) for name, value in vars(self).items() if value is not None}


def records_of(positions: Positions, coding: Coding) -> Records | Draws:
    """What a teacher pass hands to the codec."""
    if coding.method == "sample":
        return Draws(positions.draws)
    top = positions.top(coding.k)
    return Records(
        top.ids.astype(np.int64),
        top.log_probs.astype(np.float32),
        top.log_tail.astype(np.float32)[:, None],
    )


def split(positions: Positions, length: int = LENGTH) -> list[Positions]:
    """Sequences of `length` positions."""
    count = len(positions.ids) // length
    return [positions.rows(i * length, (i + 1) * length) for i in range(count)]


def through_cache(
    positions: Positions,
    coding: Coding,
    length: int = LENGTH,
    fit: int = FIT,
    token_counts: NDArray[np.int64] | None = None,
) -> Figures:
    """Writes a cache as a capture does, reads it back, and compares.

    The codebook is made of the first `fit` sequences, and of `token_counts` if ids are to be
    numbered by them; the others are measured.

    All its files count (records, index with checksums, codebook and its spare copy) but
    identity.json, whose size is the same for any number of sequences. Raises
    AssertionError if draws do not come back as they were.
    """
    parts = split(positions, length)
    fitted, measured = parts[:fit], parts[fit:]
    with tempfile.TemporaryDirectory() as folder:
        cache = open_cache(open_store(folder), {"bench": str(coding)})
        sample = [records_of(part, coding) for part in fitted]
        codebook = publish_codebook(cache, "train", fit_codebook(coding, sample, token_counts))
        keys = [number.to_bytes(16, "big") for number in range(len(measured))]
        blobs = [encode(records_of(part, coding), codebook) for part in measured]
        write_shard(cache, "train", keys, blobs)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        stored = sum(path.stat().st_size for path in files if path.name != IDENTITY)
        found = CacheReader(cache, "train").read_many(keys)
    rest = positions.rows(fit * length, len(parts) * length)
    count = len(rest.ids)
    own = len(codebook.to_bytes())
    if coding.method == "sample":
        drawn = _drawn(found, rest.draws.shape[1])
        assert np.array_equal(drawn, rest.draws), "other ids than were drawn"
        different = 1 + np.count_nonzero(np.diff(rest.draws, axis=1), axis=1)
        return Figures(stored / count, float(different.mean()), codebook=own)
    ids, gkl, kl_full = errors(rest.top(coding.k), found)
    return Figures(stored / count, ids, gkl, kl_full, own)


def lossless(positions: Positions, k: int) -> float:
    """The full KL of the exact top-k with its tail."""
    top = positions.top(k)
    exact = Records(top.ids.astype(np.int64), top.log_probs, top.log_tail[:, None])
    return errors(top, exact)[2]


def byte_planes(
    positions: Positions, k: int, step: float, keep: float = 0.0, length: int = LENGTH
) -> Figures:
    """The lazy control: differences of ascending ids, levels of the same quantization and a
    half-precision tail, each split into byte planes, zstd at level 3 over every sequence."""
    top = positions.top(k)
    probs = np.exp(top.log_probs)
    kept = np.sqrt(probs) >= keep * step
    kept[:, 0] = True
    dropped = np.where(kept, 0.0, probs).sum(axis=1)
    levels = np.where(kept, np.round(np.sqrt(probs) / step), 0).astype(np.int64)
    # Low levels stand for the mean of what they hold: 0 for more than 0, and where ids are
    # dropped, 1 for more than its middle.
    sums = np.bincount(levels[kept], probs[kept])
    counts = np.maximum(np.bincount(levels[kept]), 1)
    values = np.where(levels < 8, (sums / counts)[levels], (levels * step) ** 2)
    tail = (np.log(np.exp(top.log_tail) + dropped)).astype(np.float16)
    log_probs = np.log(values, where=kept, out=np.full(values.shape, -np.inf))

    order = np.argsort(np.where(kept, top.ids, top.vocab), axis=1, kind="stable")
    ids = np.take_along_axis(top.ids, order, axis=1)
    gaps = np.diff(ids, axis=1, prepend=0)
    ordered = np.take_along_axis(levels, order, axis=1)
    present = np.take_along_axis(kept, order, axis=1)
    codec = pa.Codec("zstd", compression_level=3)
    size = 0
    for start in range(0, len(ids), length):
        at = slice(start, start + length)
        here = present[at]
        columns = [gaps[at][here], ordered[at][here], tail[at].view(np.uint16)]
        if keep:
            columns.append(here.sum(axis=1))
        for column in columns:
            for plane in _planes(column):
                size += min(len(codec.compress(plane, asbytes=True)), len(plane))
        size += 32  # a row of an index
    found = Records(top.ids.astype(np.int64), log_probs, tail.astype(np.float64)[:, None])
    mean_ids, gkl, kl_full = errors(top, found)
    return Figures(size / len(ids), mean_ids, gkl, kl_full)


def _planes(values: NDArray[Any]) -> list[bytes]:
    """The bytes of unsigned numbers: all first bytes, all second ones, as many as are needed."""
    widest = int(values.max(initial=1)).bit_length()
    return [((values >> shift) & 255).astype(np.uint8).tobytes() for shift in range(0, widest, 8)]


def errors(exact: Positions, found: Records) -> tuple[float, float, float]:
    """Ids per record, generalized KL of the kept part, full KL; means over positions.

    `found` has only ids of `exact`; entries at minus infinity are none.
    """
    rows, columns = np.nonzero(found.log_probs > -np.inf)
    count = len(exact.ids)
    place = np.arange(count)[:, None] * exact.vocab
    known = (place + exact.ids).reshape(-1)
    order = np.argsort(known)
    wanted = rows * exact.vocab + found.ids[rows, columns]
    at = order[np.searchsorted(known, wanted, sorter=order)]
    assert np.array_equal(known[at], wanted), "an id that was not among the exact ones"

    log_p = exact.log_probs.reshape(-1)[at].astype(np.float64)
    log_q = found.log_probs[rows, columns].astype(np.float64)
    p, q = np.exp(log_p), np.exp(log_q)
    gkl = (p * (log_p - log_q) - p + q).sum() / count

    kept = np.bincount(rows, minlength=count)
    without = np.exp(exact.log_probs).reshape(-1).copy()
    without[at] = 0.0
    p_tail = np.exp(exact.log_tail) + without.reshape(exact.ids.shape).sum(axis=1)
    log_q_tail = found.log_tails[:, 0].astype(np.float64)
    # Losses renormalize what a record holds, so it is compared renormalized.
    log_norm = np.log(np.bincount(rows, q, count) + np.exp(log_q_tail))
    spread = log_q_tail - log_norm - np.log(np.maximum(exact.vocab - kept, 1))
    per_row = (
        -exact.entropy
        - np.bincount(rows, p * log_q, count)
        + np.bincount(rows, p, count) * log_norm
        - np.where(p_tail > 0, p_tail * spread, 0.0)
    )
    return len(rows) / count, float(gkl), float(per_row.mean())


def _drawn(found: Records, draws: int) -> NDArray[np.int64]:
    """The draws that records of them stand for: int64 [positions, draws], ascending."""
    kept = found.log_probs > -np.inf
    counts = np.rint(np.exp(found.log_probs[kept]) * draws).astype(np.int64)
    return np.sort(np.repeat(found.ids[kept], counts).reshape(-1, draws), axis=1)
