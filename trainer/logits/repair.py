"""Checks a logit cache by reading every byte of it, and repairs it.

Bad shards are dropped, so that the next capture finds their sequences missing. No records are ever
invented. Only a codebook is restored, from its spare copy, since all shards of a family hang on it.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import xxhash

from cluster.storage import Store
from cluster.storage.keys import fingerprint
from trainer.logits.codebook import Codebook, codebook_path, family_of, spare_path, unpack_codebook
from trainer.logits.codec import decode
from trainer.logits.index import MAX_SEQUENCES, Index, kind_of, rows_in
from trainer.logits.store import (
    IDENTITY,
    MAX_CODEBOOK_BYTES,
    SHARDS,
    CacheDamaged,
    Files,
    cache_fingerprint,
    list_shards,
    load_codebook,
    named_by_fingerprint,
    read_bounded,
    read_identity,
    read_index,
)

FAMILIES = ("eval", "train")
PIECE_BYTES = 8 << 20
# Shards looked at together: so many pieces, and records, are in memory at once.
TOGETHER = 4
# A capture writes a shard's records before its index; what is older than this was abandoned.
STALE_AFTER_SECONDS = 3600.0


@dataclass(frozen=True)
class Damage:
    """One file of a cache that is not as it should be.

    path: in the cache. why: goes after the path in a sentence. kind: of its records ("" for files
    that hold none). sequences: records that mending drops, as many as the index says, or, if that
    is damaged, as its size has room for. harmless: readers do not miss this file.
    """

    path: str
    why: str
    kind: str
    sequences: int
    harmless: bool = False


@dataclass(frozen=True)
class ShardState:
    """One shard as found: what is wrong with it, or how many sequences need which codebook."""

    name: str
    kind: str
    damage: Damage | None = None
    codebook: bytes = b""
    sequences: int = 0


class _Codebooks:
    """The codebooks of a cache, each read once.

    used: by family the hash and the codebook in use, None if there is none, or what is wrong.
    """

    def __init__(self, cache: Store, where: str) -> None:
        self.cache, self.where = cache, where
        self.used = {family: self._used(family) for family in FAMILIES}
        self.of = lru_cache(self._of)

    def _used(self, family: str) -> tuple[bytes, Codebook] | CacheDamaged | None:
        try:
            return load_codebook(self.cache, family)
        except CacheDamaged as error:
            return error

    def _of(self, family: str, number: bytes) -> Codebook | None:
        """The codebook with this hash: the one in use, or if that is lost its spare copy."""
        used = self.used[family]
        if isinstance(used, tuple):
            return used[1] if used[0] == number else None
        found = spare(self.cache, self.where, family, number)
        return found and found[1]


def check_cache(cache: Store) -> list[Damage]:
    """Everything that is wrong with a cache, by path; reads all of it, and decodes all records,
    in bounded memory."""
    found = _check_identity(cache)
    if found and not named_by_fingerprint(cache):
        return found  # nothing says what the other files should be of
    where = cache_fingerprint(cache)
    books = _Codebooks(cache, where)
    with ThreadPoolExecutor(TOGETHER) as pool:
        states = list(
            pool.map(lambda files: _check_shard(cache, files, where, books), list_shards(cache))
        )
    found += [state.damage for state in states if state.damage is not None]
    for family in FAMILIES:
        needing = [s for s in states if s.codebook and family_of(s.kind) == family]
        found += _check_codebook(books, family, needing)
    found += _strangers(cache)
    return sorted(found, key=lambda damage: damage.path)


def check_again(cache: Store, damage: Damage) -> Damage | None:
    """What is wrong now with a shard or the identity that was found damaged: a run may have
    written it anew since. None if it is sound or gone."""
    if damage.path == IDENTITY:
        return next(iter(_check_identity(cache) if cache.exists(IDENTITY) else []), None)
    name = damage.path.rpartition("/")[2][:-4]
    index = _size(cache, f"{SHARDS}/{name}.idx")  # first: it is written last
    files = Files(name, _size(cache, f"{SHARDS}/{name}.bin"), index)
    where = cache_fingerprint(cache)
    books = _Codebooks(cache, where)
    state = _check_shard(cache, files, where, books)
    if state.damage is not None or not state.codebook:
        return state.damage
    used = books.used[family_of(state.kind)]
    if isinstance(used, tuple) and used[0] == state.codebook:
        return None
    return _without_codebook(state)


def _size(cache: Store, path: str) -> int | None:
    try:
        return cache.size(path)
    except FileNotFoundError:
        return None


def _check_identity(cache: Store) -> list[Damage]:
    try:
        found = fingerprint(read_identity(cache))
    except CacheDamaged as error:
        return [Damage(IDENTITY, error.why, "", 0)]
    if found == cache.name or not named_by_fingerprint(cache):
        return []
    return [Damage(IDENTITY, f"is damaged: it is of another logit cache, {found}", "", 0)]


def _check_shard(cache: Store, files: Files, where: str, books: _Codebooks) -> ShardState:
    kind, path = kind_of(files.name) or "", f"{SHARDS}/{files.name}.bin"
    if files.idx is None:
        return ShardState(files.name, kind, _unfinished(cache, kind, files.name))
    try:
        index = read_index(cache, files, where)
    except CacheDamaged as error:
        space = min(rows_in(files.idx), MAX_SEQUENCES)
        return ShardState(files.name, kind, Damage(error.path, error.why, kind, space))
    if index is None:  # dropped since the listing
        return ShardState(files.name, kind)
    sequences = len(index.keys)
    try:
        book = books.of(family_of(kind), index.codebook)
        bad, undecodable = _bad_records(cache, path, index, book)
    except FileNotFoundError:
        return ShardState(files.name, kind, Damage(path, "is missing", kind, sequences))
    if bad or undecodable:
        why = f"is damaged in {bad + undecodable} of its {sequences} records"
        if not bad:
            why = f"holds no valid record of {undecodable} of its {sequences} sequences"
        return ShardState(files.name, kind, Damage(path, why, kind, sequences))
    return ShardState(files.name, kind, None, index.codebook, sequences)


def _unfinished(cache: Store, kind: str, name: str) -> Damage | None:
    path = f"{SHARDS}/{name}.bin"
    try:
        young = time.time() - cache.modified(path) < STALE_AFTER_SECONDS
    except FileNotFoundError:
        return None
    if young or cache.exists(f"{SHARDS}/{name}.idx"):
        return None
    return Damage(path, "is unfinished: its index was never written", kind, 0, harmless=True)


def _bad_records(cache: Store, path: str, index: Index, book: Codebook | None) -> tuple[int, int]:
    """How many records' bytes do not fit their checksums, and how many others do not decode.

    The file is read in pieces, and decoded one record at a time (not at all without the codebook).
    Raises FileNotFoundError.
    """
    whole = hashlib.blake2b(digest_size=16)
    bad, undecodable, row, left = 0, 0, 0, int(index.lengths[0])
    state = xxhash.xxh3_64(index.keys[0].tobytes())
    parts: list[memoryview] = []  # of the record that the pieces have reached
    for piece in _pieces(cache, path, index.size):
        whole.update(piece)
        at = 0
        while at < len(piece):
            part = piece[at : at + left]
            state.update(part)
            at, left = at + len(part), left - len(part)
            if book is not None:
                parts.append(part)
            if not left:
                if state.intdigest() != index.sums[row]:
                    bad += 1
                elif book is not None and not _decodes(parts, book):
                    undecodable += 1
                parts.clear()
                row += 1
                if row < len(index.keys):
                    left = int(index.lengths[row])
                    state = xxhash.xxh3_64(index.keys[row].tobytes())
    return bad if whole.digest() == index.digest else max(bad, 1), undecodable


def _decodes(parts: list[memoryview], book: Codebook) -> bool:
    try:
        decode(parts[0] if len(parts) == 1 else b"".join(parts), book)
    except ValueError:
        return False
    return True


def _pieces(cache: Store, path: str, size: int) -> Iterator[memoryview]:
    for start in range(0, size, PIECE_BYTES):
        yield memoryview(cache.read_range(path, start, min(start + PIECE_BYTES, size)))


def _check_codebook(books: _Codebooks, family: str, shards: list[ShardState]) -> Iterator[Damage]:
    """Damage of a family's codebook, and of the shards that it leaves without one."""
    cache, where = books.cache, books.where
    path = codebook_path(family)
    why, number = "", b""
    used = books.used[family]
    if isinstance(used, CacheDamaged):
        why = used.why
    elif used is not None:
        number = used[0]
    elif shards:
        why = "is missing"
    if why:
        number = restorable(cache, where, family, shards)
        yield Damage(path, why + ("; its spare copy is intact" if number else ""), family, 0)
    elif number and not spare(cache, where, family, number):
        why = "is missing or damaged; it is the spare copy of the codebook"
        yield Damage(spare_path(family, number), why, family, 0, harmless=True)
    for shard in shards:
        if shard.codebook != number:
            yield _without_codebook(shard)


def _without_codebook(shard: ShardState) -> Damage:
    path = f"{SHARDS}/{shard.name}.idx"
    return Damage(path, "needs a codebook that is lost", shard.kind, shard.sequences)


def spare(cache: Store, where: str, family: str, number: bytes) -> tuple[bytes, Codebook] | None:
    """The spare copy of the codebook with this hash, as a file and read; None unless intact."""
    try:
        data = read_bounded(cache, spare_path(family, number), MAX_CODEBOOK_BYTES)
        found, codebook = unpack_codebook(data, family, where)
    except (FileNotFoundError, ValueError):
        return None
    return (data, codebook) if found == number else None


def restorable(cache: Store, where: str, family: str, shards: Sequence[ShardState]) -> bytes:
    """Of the codebooks with an intact spare copy that which most sequences need, else b""."""
    needed: Counter[bytes] = Counter()
    for shard in shards:
        needed[shard.codebook] += shard.sequences
    ranked = sorted(needed, key=lambda number: (-needed[number], number))
    return next((n for n in ranked if spare(cache, where, family, n)), b"")


def _strangers(cache: Store) -> Iterator[Damage]:
    """Objects among the shards that are none."""
    for name in cache.sizes(SHARDS):
        if name[-4:] not in (".bin", ".idx") or kind_of(name[:-4]) is None:
            yield Damage(f"{SHARDS}/{name}", "is no file of a logit cache", "", 0, harmless=True)


def mend(cache: Store, damage: Damage) -> bool:
    """Drops one damaged file, a shard's index first; a codebook comes back from its spare copy.

    A damaged identity is written again by the next job that opens the cache. Returns False, and
    changes nothing, if the file is sound or gone by now: runs may write while a cache is mended.
    """
    folder, _, name = damage.path.rpartition("/")
    shard = folder == SHARDS and kind_of(name[:-4]) is not None
    if shard or damage.path == IDENTITY:
        again = check_again(cache, damage)
        if again is None or damage.harmless > again.harmless:
            return False
        damage = again
    if shard and not damage.harmless:
        drop_shard(cache, name[:-4])
    elif damage.path == codebook_path(damage.kind):
        return _restore_codebook(cache, damage.kind)
    elif folder == "codebooks":
        _renew_spare(cache, damage)
    else:  # of an unfinished shard only the records, as a run may be about to write its index
        with suppress(FileNotFoundError):
            cache.delete(damage.path)
    return True


def drop_shard(cache: Store, name: str) -> None:
    """Deletes a shard: its index first, so that a reader sees all of it or nothing.

    Raises ValueError for what is no shard's name.
    """
    if kind_of(name) is None:
        raise ValueError(f"{name!r} is no shard of a logit cache; its name is <kind>-<32 hex>")
    for suffix in (".idx", ".bin"):
        with suppress(FileNotFoundError):
            cache.delete(f"{SHARDS}/{name}{suffix}")


def _restore_codebook(cache: Store, family: str) -> bool:
    """Puts the spare copy that shards need in the codebook's place, or deletes the codebook;
    False, and nothing, if there is a sound one."""
    with suppress(CacheDamaged):
        if load_codebook(cache, family) is not None:
            return False
    where = cache_fingerprint(cache)
    states = []
    for files in list_shards(cache):
        kind = kind_of(files.name) or ""
        if files.idx is None or family_of(kind) != family:
            continue
        with suppress(CacheDamaged):
            if (index := read_index(cache, files, where)) is not None:
                sequences = len(index.keys)
                states.append(ShardState(files.name, kind, None, index.codebook, sequences))
    number = restorable(cache, where, family, states)
    found = spare(cache, where, family, number) if number else None
    if found is not None:
        cache.write_bytes(codebook_path(family), found[0])
    else:
        with suppress(FileNotFoundError):
            cache.delete(codebook_path(family))
    return True


def _renew_spare(cache: Store, damage: Damage) -> None:
    """Writes the spare copy of the codebook in use again."""
    loaded = load_codebook(cache, damage.kind)
    if loaded is not None:
        cache.write_bytes(damage.path, cache.read_bytes(codebook_path(damage.kind)))
