"""Reading a logit cache: the records of any sequences, by key, from a folder or a bucket.

What is kept in memory is arrays of 40 bytes per sequence. Of a shard's records exactly the wanted
bytes are read, and each record's checksum is looked at before it is decoded.

`read_along` lays records of some positions out along all of them: a cache of positions: loss has a
row for each position that counts in the loss, in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cluster.storage import Store
from trainer.logits.codebook import Codebook, codebook_path, family_of
from trainer.logits.codec import decode_many
from trainer.logits.index import KEY_BYTES, Index, checksum, kind_of
from trainer.logits.records import Coding, Records
from trainer.logits.store import (
    IDENTITY,
    SHARDS,
    CacheDamaged,
    Files,
    cache_fingerprint,
    damaged,
    list_shards,
    load_codebook,
    read_identity,
    read_index,
)

Key: TypeAlias = bytes  # spelled before the classes, where `bytes` is a size
Blob: TypeAlias = bytes
THREADS = 16  # requests under way at once; a request waits far longer than it computes


class MissingRecord(KeyError):
    """A sequence that the cache does not hold."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError's own text comes in quotes


@dataclass(frozen=True)
class Shard:
    """One finished shard: how many sequences, and bytes of records and index together."""

    name: str
    kind: str
    sequences: int
    bytes: int


class CacheReader:
    """Random access to the records of one kind by sequence key; many threads may use it at once.

    It knows the shards that were there when it was opened.
    """

    def __init__(self, cache: Store, kind: str) -> None:
        """Reads the indexes and the codebook, not the records.

        Raises CacheDamaged, naming the file and the command that mends it.
        """
        self.cache = cache
        self.kind = kind
        where = cache_fingerprint(cache)
        listed = [f for f in list_shards(cache) if kind_of(f.name) == kind and f.idx is not None]
        with ThreadPoolExecutor(THREADS) as pool:
            indexes = list(pool.map(lambda files: read_index(cache, files, where), listed))
        found = [
            (files, index)
            for files, index in zip(listed, indexes, strict=True)
            if index is not None
        ]
        self._codebook = _codebook(cache, kind, found)
        self._shards = [
            Shard(files.name, kind, len(index.keys), index.size + (files.idx or 0))
            for files, index in found
        ]
        self._load([index for _, index in found])
        # Of a local folder one read takes microseconds, less than handing it to a thread.
        self._pool = ThreadPoolExecutor(THREADS) if cache.local() is None else None

    def _load(self, indexes: Sequence[Index]) -> None:
        """Sorts all sequences by key; of several records of one, the first shard's stays."""
        keys = _join([index.keys for index in indexes], np.uint8).reshape(-1, KEY_BYTES)
        order = np.argsort(_sortable(keys), kind="stable")
        names = _sortable(keys)[order]
        first = np.ones(len(names), bool)
        first[1:] = names[1:] != names[:-1]
        order, self._keys = order[first], names[first]
        counts = [len(index.keys) for index in indexes]
        self._shard = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)[order]
        self._start = _join([index.starts() for index in indexes], np.int64)[order]
        self._length = _join([index.lengths for index in indexes], np.uint32)[order]
        self._sum = _join([index.sums for index in indexes], np.uint64)[order]

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: Key) -> bool:
        return bool(self._rows(_array([key]))[0] >= 0)

    @property
    def coding(self) -> Coding | None:
        """What is kept of every distribution; None of an empty cache."""
        return None if self._codebook is None else self._codebook.coding

    @cached_property
    def positions(self) -> str:
        """Which positions of a sequence have records, by the cache's identity: "all", or those
        that count in the loss, "loss"."""
        if not self.cache.exists(IDENTITY):
            return "all"
        return str(read_identity(self.cache).get("cache.positions", "all"))

    @property
    def bytes(self) -> int:
        """Stored bytes of this kind: records and indexes."""
        return sum(shard.bytes for shard in self._shards)

    @property
    def keys(self) -> NDArray[np.uint8]:
        """The keys of all sequences, ascending: uint8 [sequences, 16]."""
        return self._keys.view(np.uint8).reshape(-1, KEY_BYTES)

    def shards(self) -> list[Shard]:
        """The shards of this kind, by name."""
        return list(self._shards)

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys` that the cache does not hold, sorted, each once."""
        asked = np.unique(_array(list(keys)))
        absent = asked[self._rows(asked) < 0].tobytes()
        return [absent[i : i + KEY_BYTES] for i in range(0, len(absent), KEY_BYTES)]

    def read(self, key: Key) -> Records:
        """The records of one sequence. Raises MissingRecord, naming the way out, if it is not
        there, and CacheDamaged."""
        return self.read_many([key])

    def read_many(self, keys: Sequence[Key], length: int | Sequence[int] | None = None) -> Records:
        """The records of several sequences, one after the other along the positions.

        length: positions of every sequence, or of each one, where that is known. The width is that
        of the widest row.
        Raises MissingRecord, naming the way out, CacheDamaged (also for another length), and
        ValueError for no keys at all.
        """
        if not keys:
            raise ValueError("read_many needs at least one sequence key")
        rows = self._rows(_array(keys))
        for key, row in zip(keys, rows, strict=True):
            if row < 0:
                raise MissingRecord(
                    f"sequence {key.hex()} has no {self.kind} records in the logit cache "
                    f"{self.cache.url}; add them with: stillhouse run SPEC --redo capture"
                )
        read = map if self._pool is None or len(keys) == 1 else self._pool.map
        blobs = list(read(self._record, rows.tolist()))
        assert self._codebook is not None  # there are sequences
        try:
            return decode_many(blobs, self._codebook, length)
        except ValueError as error:
            raise self._undecodable(rows.tolist(), blobs, length, error) from error

    def close(self) -> None:
        """Ends the threads that read from a bucket."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _rows(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """The place of each key in the arrays, -1 where it is not there."""
        if not len(self._keys):
            return np.full(len(keys), -1, np.int64)
        rows = np.searchsorted(self._keys, keys)
        rows[rows == len(self._keys)] = 0
        return np.where(self._keys[rows] == keys, rows, -1)

    def _record(self, row: int) -> Blob:
        """The stored bytes of one record, as they were written."""
        path = self._path(row)
        start, length = int(self._start[row]), int(self._length[row])
        try:
            data = self.cache.read_range(path, start, start + length)
        except FileNotFoundError:
            raise damaged(self.cache, path, "is missing") from None
        key = self._keys[row : row + 1].tobytes()
        if len(data) != length:
            raise damaged(self.cache, path, f"is cut short in the record of sequence {key.hex()}")
        if checksum(key, data) != self._sum[row]:
            raise damaged(self.cache, path, f"is damaged in the record of sequence {key.hex()}")
        return data

    def _path(self, row: int) -> str:
        return f"{SHARDS}/{self._shards[self._shard[row]].name}.bin"

    def _undecodable(
        self,
        rows: list[int],
        blobs: list[Blob],
        length: int | Sequence[int] | None,
        error: ValueError,
    ) -> CacheDamaged:
        """Names the record that cannot be decoded although it is as it was written."""
        assert self._codebook is not None
        lengths = length if isinstance(length, Sequence) else [length] * len(rows)
        for row, blob, its_length in zip(rows, blobs, lengths, strict=True):
            try:
                decode_many([blob], self._codebook, its_length)
            except ValueError as its_error:
                key = self._keys[row : row + 1].tobytes().hex()
                why = f"holds no valid record of sequence {key}: {its_error}"
                return damaged(self.cache, self._path(row), why)
        return damaged(self.cache, SHARDS, f"holds records that do not fit each other: {error}")


def _codebook(cache: Store, kind: str, found: Sequence[tuple[Files, Index]]) -> Codebook | None:
    """The codebook that all of these shards were written with."""
    loaded = load_codebook(cache, kind)
    path = codebook_path(family_of(kind))
    if loaded is None:
        if found:
            raise damaged(cache, path, "is missing")
        return None
    for files, index in found:
        if index.codebook != loaded[0]:
            why = f"needs another codebook than {path}"
            raise damaged(cache, f"{SHARDS}/{files.name}.idx", why)
    return loaded[1]


def _array(keys: Sequence[bytes]) -> NDArray[np.bytes_]:
    """Sequence keys as an array that compares like bytes."""
    if any(len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"a sequence key is not of {KEY_BYTES} bytes")
    return _sortable(np.frombuffer(b"".join(keys), np.uint8))


def _sortable(keys: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Keys as fixed strings: zeros at an end are padding to numpy, so equal width is the same."""
    return np.ascontiguousarray(keys).reshape(-1).view(f"S{KEY_BYTES}")


def _join(parts: Sequence[NDArray], dtype: type) -> NDArray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def read_along(
    reader: CacheReader, keys: Sequence[bytes], loss_mask: NDArray, positions: str
) -> Records:
    """The records of sequences along all their positions, one sequence after the other.

    loss_mask: [sequences, seq], not 0 where a position counts. positions: of which the cache has
    records, "all" or "loss". Rows of the other positions repeat one that was captured, so that
    whatever is computed of them is a number. Raises MissingRecord, and CacheDamaged also for a
    record of another number of positions.
    """
    if positions == "all":
        return reader.read_many(keys, loss_mask.shape[1])
    counted = np.asarray(loss_mask) != 0
    found = reader.read_many(keys, counted.sum(axis=1).tolist())
    return take(found, rows_of(counted))


def rows_of(counted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each position of [sequences, seq], flat, the row of its record; where there is none, of
    the last record before it."""
    return np.maximum(np.cumsum(counted.reshape(-1)) - 1, 0)


def take(records: Records, rows: NDArray[np.int64]) -> Records:
    """The rows `rows` of records, in that order, repeats allowed."""
    entropy, true = records.entropy, records.true_log_prob
    return Records(
        records.ids[rows],
        records.log_probs[rows],
        records.log_tails[rows],
        None if entropy is None else entropy[rows],
        None if true is None else true[rows],
    )
