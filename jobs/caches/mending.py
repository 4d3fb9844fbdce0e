"""Mending and removing logit caches: what would be lost, and doing it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.storage import Store, open_store
from trainer.fingerprint import fingerprint
from trainer.logits.index import KEY_BYTES, Index, kind_of
from trainer.logits.repair import Damage
from trainer.logits.store import (
    IDENTITY,
    SHARDS,
    CacheDamaged,
    Files,
    cache_fingerprint,
    list_shards,
    open_cache,
    read_own_index,
)

THREADS = 8


@dataclass(frozen=True)
class Loss:
    """What mending takes from one kind of records.

    sequences: those that no other shard holds, which the next capture makes again if they are
    still wanted; unknown: as many more at most, of shards whose index cannot be read.
    """

    kind: str
    sequences: int
    unknown: int


def losses(cache: Store, found: Sequence[Damage]) -> list[Loss]:
    """What is lost by mending these damages, by kind."""
    shards = {d.path.rpartition("/")[2][:-4]: d for d in found if d.sequences}
    kinds = sorted({kind for name in shards if (kind := kind_of(name))})
    listed = list_shards(cache)
    where = cache_fingerprint(cache) if kinds else ""
    result = []
    for kind in kinds:
        lost: list[NDArray] = []
        held: list[NDArray] = []
        unknown = 0
        of_kind = [f for f in listed if kind_of(f.name) == kind and f.idx is not None]
        with ThreadPoolExecutor(THREADS) as pool:
            indexes = list(pool.map(lambda files: _index(cache, files), of_kind))
        for files, index in zip(of_kind, indexes, strict=True):
            if index is None:
                unknown += shards[files.name].sequences if files.name in shards else 0
            elif index.cache == where:  # another cache's were never readable here
                (lost if files.name in shards else held).append(_keys(index))
        gone = np.setdiff1d(_all(lost), _all(held))
        result.append(Loss(kind, len(gone), unknown))
    return result


def consequences(found: Sequence[Loss]) -> list[str]:
    """What mending costs, in words."""
    if not found:
        return ["no records are lost by mending this"]
    lines = []
    for loss in found:
        count = f"{loss.sequences:,}"
        if loss.unknown:
            count = f"{loss.sequences:,} to {loss.sequences + loss.unknown:,}"
        lines.append(
            f"the next run captures {count} sequences of {loss.kind} again, if it wants them"
        )
    return lines


def restore_identity(cache: Store, identities: Iterable[dict[str, Any]]) -> bool:
    """Writes a cache's identity again if one of these is it; whether it is there afterwards."""
    folder = open_store(cache.url.rpartition("/")[0])
    for identity in identities:
        if fingerprint(identity) == cache.name and not cache.exists(IDENTITY):
            open_cache(folder, identity)
    return cache.exists(IDENTITY)


def remove(cache: Store) -> None:
    """Deletes a cache: indexes first, so that what a kill leaves of it is no damage."""
    indexes = [f"{SHARDS}/{name}" for name in cache.list(SHARDS) if name.endswith(".idx")]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda path: _delete(cache, path), indexes))
    with suppress(FileNotFoundError):
        cache.delete("", recursive=True)


def _delete(cache: Store, path: str) -> None:
    with suppress(FileNotFoundError):
        cache.delete(path)


def _index(cache: Store, files: Files) -> Index | None:
    """A shard's index, None if it cannot be read."""
    with suppress(CacheDamaged):
        return read_own_index(cache, files)
    return None


def _keys(index: Index) -> NDArray:
    return np.ascontiguousarray(index.keys).reshape(-1).view(f"S{KEY_BYTES}")


def _all(keys: Sequence[NDArray]) -> NDArray:
    return np.concatenate(keys) if keys else np.zeros(0, f"S{KEY_BYTES}")
