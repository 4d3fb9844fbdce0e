"""Mending a logit cache: bad shards are dropped, so the next capture finds their sequences missing.

No records are ever invented. Only a codebook is restored, from its spare copy, since all shards
of a family hang on it.
"""

from __future__ import annotations

from contextlib import suppress

from cluster.storage import Store
from trainer.logits.codebook_file import codebook_path, family_of
from trainer.logits.damage import Damage, ShardState, check_again, restorable, spare
from trainer.logits.index import kind_of
from trainer.logits.store import (
    IDENTITY,
    SHARDS,
    CacheDamaged,
    cache_fingerprint,
    list_shards,
    load_codebook,
    read_index,
)


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
