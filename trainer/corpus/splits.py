"""Which documents there are, and which part each belongs to: pure functions on numpy arrays.

A document is known by the blake2b-128 hash of its text (NFC-normalised, stripped), or of what is
said in it by whom. Of equal
documents the first stays, in the order of sources, shards and rows. The hash also orders the
documents: the held-out parts take them from the front of that order, so a document's place
depends on nothing but its text and the seed, and no document is in two parts.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.corpus.conversations import measure_row
from trainer.corpus.sources import Document, Shard, read_documents

TOKEN_BYTES = 4  # what a token counts in documents that are token ids already


@dataclass(frozen=True)
class Scan:
    """What the documents of a shard are, row by row, without their text.

    digests: uint8 [rows, 16]. sizes: int64 [rows], UTF-8 bytes (token ids: 4 each). kept: bool
    [rows], False where empty or outside of min_chars and max_chars.
    """

    digests: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    kept: NDArray[np.bool_]


@dataclass(frozen=True)
class Documents:
    """The distinct documents of a corpus in seeded-hash order; arrays of the same length.

    shards: int32, index into the list of shards. rows: int64, the row within its shard, from 0.
    sizes: int64, bytes. read, filtered, duplicate: documents per shard, int64 [shards].
    """

    shards: NDArray[np.int32]
    rows: NDArray[np.int64]
    sizes: NDArray[np.int64]
    read: NDArray[np.int64]
    filtered: NDArray[np.int64]
    duplicate: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def rows_by_shard(
        self, start: int, stop: int | None = None, ascending: bool = True
    ) -> list[NDArray[np.int64]]:
        """For every shard its rows among documents [start, stop) of the order: ascending, or as
        the order has them."""
        shards, rows = self.shards[start:stop], self.rows[start:stop]
        order = np.lexsort((rows, shards)) if ascending else np.argsort(shards, kind="stable")
        edges = np.searchsorted(shards[order], np.arange(len(self.read) + 1))
        return [rows[order[a:b]] for a, b in zip(edges, edges[1:], strict=False)]


def scan(shard: Shard, min_chars: int, max_chars: int | None) -> Scan:
    """Hash and measure every document of a shard; the limits are in characters of what is said,
    and not for token ids."""
    digests, sizes, kept = bytearray(), [], []
    for document in read_documents(shard):
        digest, size, keep = measure(document, min_chars, max_chars)
        digests += digest
        sizes.append(size)
        kept.append(keep)
    return Scan(
        np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, 16),
        np.array(sizes, dtype=np.int64),
        np.array(kept, dtype=np.bool_),
    )


def measure(document: Document, min_chars: int, max_chars: int | None) -> tuple[bytes, int, bool]:
    """(hash of 16 bytes, size in bytes, whether it is kept) of one document."""

    def fits(chars: int) -> bool:
        return chars >= max(min_chars, 1) and (max_chars is None or chars <= max_chars)

    if isinstance(document, str):
        text = unicodedata.normalize("NFC", document).strip()
        data = text.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(data, digest_size=16).digest(), len(data), fits(len(text))
    if not isinstance(document, list):
        known, size, chars = measure_row(document)
        return known, size, fits(chars) and not document.is_empty
    data = np.array(document, dtype="<i8").tobytes()
    digest = hashlib.blake2b(data, digest_size=16, person=b"input_ids").digest()
    return digest, TOKEN_BYTES * len(document), bool(document)


def merge(scans: Sequence[Scan], seed: int) -> Documents:
    """Drop filtered and repeated documents of all shards, put the rest in seeded-hash order."""
    lengths = np.array([len(scan.kept) for scan in scans], dtype=np.int64)
    shards = np.repeat(np.arange(len(scans), dtype=np.int32), lengths)
    first = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.arange(first[-1], dtype=np.int64) - first[shards]
    kept = np.concatenate([scan.kept for scan in scans] or [np.zeros(0, np.bool_)])
    digests = np.concatenate([scan.digests for scan in scans] or [np.zeros((0, 16), np.uint8)])
    sizes = np.concatenate([scan.sizes for scan in scans] or [np.zeros(0, np.int64)])

    candidates = np.flatnonzero(kept)
    halves = np.ascontiguousarray(digests[candidates]).view("<u8").reshape(-1, 2)
    order = np.lexsort((candidates, halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    chosen = candidates[order[new]]
    repeated = candidates[order[~new]]

    mixed = mix(halves[order[new]][:, 0], seed)
    chosen = chosen[np.argsort(mixed, kind="stable")]
    count = len(scans)
    return Documents(
        shards[chosen],
        rows[chosen],
        sizes[chosen],
        lengths,
        np.bincount(shards[~kept], minlength=count).astype(np.int64),
        np.bincount(shards[repeated], minlength=count).astype(np.int64),
    )


def mix(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """A bijection of 64-bit values for every seed: the finalizer of SplitMix64 (Steele 2014)."""
    golden = 0x9E3779B97F4A7C15
    z = values + np.uint64(seed * golden % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def read_in_order(shard: Shard, rows: NDArray[np.int64]) -> list[Document]:
    """The documents at `rows` of a shard, in any order, each once, in that order."""
    order = np.argsort(rows)
    found = dict(zip(rows[order].tolist(), read_rows(shard, rows[order]), strict=True))
    return [found[row] for row in rows.tolist()]


def read_rows(shard: Shard, rows: NDArray[np.int64]) -> list[Document]:
    """The documents at ascending `rows` of a shard."""
    result: list[Document] = []
    if len(rows) == 0:
        return result
    wanted = iter(rows.tolist())
    next_row = next(wanted)
    for row, document in enumerate(read_documents(shard)):
        if row == next_row:
            result.append(document)
            following = next(wanted, None)
            if following is None:
                return result
            next_row = following
    raise RuntimeError(f"{shard.label}: row {next_row} is gone; the data changed while it was read")
