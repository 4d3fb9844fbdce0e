"""The logit cache on storage: immutable shards, found by sequence key.

    _logits/<fingerprint>/identity.json              what the records are of
    _logits/<fingerprint>/codebook-<family>.bin      what all records of a family need
    _logits/<fingerprint>/codebooks/<family>-<hash>.bin   a spare copy of it, for repairs
    _logits/<fingerprint>/shards/<kind>-<hash>.bin   records of many sequences, back to back
    _logits/<fingerprint>/shards/<kind>-<hash>.idx   which, where, checksums: written last

A shard exists once its index does. Its name is the hash of its content, so writers need no lock:
two captures of the same sequences write the same or harmlessly redundant shards. The codebook is
created exclusively, and whoever comes second uses the one that is there. Kinds: "train" (for
losses; "train1"... are further draws of the same family) and "eval" (for measuring later models
against the teacher). The folder's name is the fingerprint that every file in it carries.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.storage import Store
from cluster.storage.keys import fingerprint
from trainer.logits.codebook import (
    Codebook,
    codebook_path,
    family_of,
    pack_codebook,
    spare_path,
    unpack_codebook,
)
from trainer.logits.index import (
    MAX_INDEX_BYTES,
    Index,
    check_kind,
    kind_of,
    make_index,
    pack,
    shard_name,
    unpack,
)

SHARDS = "shards"
IDENTITY = "identity.json"
MAX_IDENTITY_BYTES = 1 << 20
MAX_CODEBOOK_BYTES = 16 << 20
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


class CacheMismatch(ValueError):
    """The cache holds something else than what is asked for."""


class CacheDamaged(ValueError):
    """A file of the cache is not what was written: `path` in the cache, and `why`."""

    path = ""
    why = ""


def command(name: str, cache: Store) -> str:
    """A command line of `stillhouse cache` for this cache."""
    return shlex.join(["stillhouse", "cache", name, cache.url])


def damaged(cache: Store, path: str, why: str) -> CacheDamaged:
    """The error for one file of a cache: one line with the command that mends it."""
    mended_by = command("repair", cache)
    error = CacheDamaged(f"{cache.path(path)} {why}; mend the cache with: {mended_by}")
    error.path, error.why = path, why  # not arguments: an exception is pickled by its arguments
    return error


def read_bounded(cache: Store, path: str, most: int) -> bytes:
    """A whole file of at most `most` bytes; a larger one is not read.

    Raises FileNotFoundError, and CacheDamaged for a larger one.
    """
    size = cache.size(path)
    if size > most:
        raise damaged(cache, path, f"is damaged: it has {size} bytes, and may have {most}")
    return cache.read_bytes(path)


def open_cache(root: Store, identity: dict[str, Any]) -> Store:
    """The cache of this identity under `root`; its identity is written if it is new.

    Raises CacheMismatch, naming the difference, if the folder holds another identity, and
    CacheDamaged if its identity cannot be read.
    """
    cache = root.sub(fingerprint(identity))
    payload = json.dumps(identity, sort_keys=True, indent=1).encode()
    if not cache.create(IDENTITY, payload):
        check_identity(cache, identity)
    return cache


def read_identity(cache: Store) -> dict[str, Any]:
    """What the cache's records are of. Raises CacheDamaged if that is missing or unreadable."""
    try:
        found = json.loads(read_bounded(cache, IDENTITY, MAX_IDENTITY_BYTES))
    except FileNotFoundError:
        raise damaged(cache, IDENTITY, "is missing") from None
    except CacheDamaged:
        raise
    except (ValueError, RecursionError):
        raise damaged(cache, IDENTITY, "is damaged: it is not valid JSON") from None
    if not isinstance(found, dict):
        raise damaged(cache, IDENTITY, "is damaged: it names no identity")
    return found


def check_identity(cache: Store, identity: dict[str, Any]) -> None:
    """Raises CacheMismatch with the first difference between the cache's identity and this one,
    CacheDamaged if it cannot be read."""
    found = read_identity(cache)
    for name in sorted(set(found) | set(identity)):
        if name not in found or name not in identity or found[name] != identity[name]:
            way_out = f"remove it with: {command('rm', cache)}"
            if cache.name == fingerprint(identity):  # only what the file says is another's
                way_out = f"mend the cache with: {command('repair', cache)}"
            raise CacheMismatch(
                f"{cache.path(IDENTITY)}: logit cache of another {name}: "
                f"it has {found.get(name)!r}, asked for {identity.get(name)!r}; {way_out}"
            )


def named_by_fingerprint(cache: Store) -> bool:
    """Whether the folder has the name that `open_cache` gave it."""
    return _FINGERPRINT.fullmatch(cache.name) is not None


def cache_fingerprint(cache: Store) -> str:
    """What every file of the cache carries: the folder's name, or in a folder that was given
    another name, what its identity says (a folder without one has the identity {})."""
    if named_by_fingerprint(cache):
        return cache.name
    return fingerprint(read_identity(cache) if cache.exists(IDENTITY) else {})


def load_codebook(cache: Store, kind: str) -> tuple[bytes, Codebook] | None:
    """The hash and the codebook for a kind of records, None if there is none yet.

    Raises CacheDamaged.
    """
    family = family_of(kind)
    path = codebook_path(family)
    try:
        data = read_bounded(cache, path, MAX_CODEBOOK_BYTES)
    except FileNotFoundError:
        return None
    where = cache_fingerprint(cache)
    try:
        return unpack_codebook(data, family, where)
    except ValueError as error:
        raise damaged(cache, path, str(error)) from error


def read_codebook(cache: Store, kind: str) -> Codebook | None:
    """The codebook for a kind of records, None if there is none yet. Raises CacheDamaged."""
    found = load_codebook(cache, kind)
    return found and found[1]


def publish_codebook(cache: Store, kind: str, codebook: Codebook) -> Codebook:
    """Gives the cache this codebook unless it has one; returns the one that it has afterwards.

    Raises CacheDamaged if the one that is there cannot be read.
    """
    check_kind(kind)
    family = family_of(kind)
    number, data = pack_codebook(codebook, family, cache_fingerprint(cache))
    cache.write_bytes(spare_path(family, number), data)  # first: what is in use has a spare
    cache.create(codebook_path(family), data)
    found = read_codebook(cache, kind)
    if found is None:
        raise damaged(cache, codebook_path(family), "was deleted as soon as it was written")
    return found


def write_shard(
    cache: Store,
    kind: str,
    keys: Sequence[bytes],
    blobs: Sequence[bytes],
    codebook: Codebook | None = None,
) -> tuple[str, int]:
    """Publishes one shard: `blobs[i]` is the encoded record of the sequence `keys[i]`.

    codebook: the one that encoded them (None: the cache's own). Returns the shard's name and its
    bytes, index included. Raises ValueError for keys and blobs that do not fit each other, and if
    the cache has no codebook or no longer, CacheMismatch if the cache has another codebook by now.
    """
    check_kind(kind)
    where = cache_fingerprint(cache)
    found = load_codebook(cache, kind)
    if found is None:
        raise ValueError(
            f"{cache.path(codebook_path(family_of(kind)))} is missing: the logit cache was removed "
            "while this capture ran; capture anew with: stillhouse run SPEC"
        )
    if codebook is not None and pack_codebook(codebook, family_of(kind), where)[0] != found[0]:
        raise CacheMismatch(
            f"{cache.path(codebook_path(family_of(kind)))} was replaced while records were made "
            "with it; capture again with: stillhouse run SPEC"
        )
    index = make_index(kind, where, found[0], keys, blobs)
    packed = pack(index)
    name = shard_name(kind, packed)
    cache.write_bytes(f"{SHARDS}/{name}.bin", b"".join(blobs))
    cache.write_bytes(f"{SHARDS}/{name}.idx", packed)
    return name, index.size + len(packed)


@dataclass(frozen=True)
class Files:
    """The files of one shard as listed: bytes of each, None for one that is not there."""

    name: str
    bin: int | None = None
    idx: int | None = None


def list_shards(cache: Store) -> list[Files]:
    """The shards of a cache, finished or not, by name; other files are left out."""
    sizes = cache.sizes(SHARDS)
    stems = sorted({name[:-4] for name in sizes if name[-4:] in (".bin", ".idx")})
    return [
        Files(stem, sizes.get(f"{stem}.bin"), sizes.get(f"{stem}.idx"))
        for stem in stems
        if kind_of(stem)
    ]


def read_own_index(cache: Store, files: Files) -> Index | None:
    """A shard's index, whatever became of its records; None if it was deleted since the listing.

    Raises CacheDamaged for an index that is not as it was written.
    """
    path = f"{SHARDS}/{files.name}.idx"
    if (files.idx or 0) > MAX_INDEX_BYTES:
        raise damaged(cache, path, f"has {files.idx} bytes, more than any index of a logit cache")
    try:
        return unpack(cache.read_bytes(path), files.name)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(cache, path, str(error)) from error


def read_index(cache: Store, files: Files, where: str) -> Index | None:
    """A shard's index; None if it was deleted since the listing.

    where: the cache's fingerprint. Raises CacheDamaged for an index that is damaged or not of
    this cache, and for records that are missing or of another size than the index says.
    """
    index = read_own_index(cache, files)
    if index is None:
        return None
    if index.cache != where:
        path = f"{SHARDS}/{files.name}.idx"
        raise damaged(cache, path, f"belongs to another logit cache, {index.cache}")
    path = f"{SHARDS}/{files.name}.bin"
    size = files.bin
    if size is None:  # a listing may see the later of two new objects and not the earlier
        try:
            size = cache.size(path)
        except FileNotFoundError:
            raise damaged(cache, path, "is missing") from None
    if size != index.size:
        raise damaged(cache, path, f"has {size} bytes instead of {index.size}")
    return index
