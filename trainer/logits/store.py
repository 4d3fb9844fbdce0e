"""The logit cache on storage: immutable shards, found by sequence key.

    _logits/<fingerprint>/identity.json          what the records are of
    _logits/<fingerprint>/shards/<name>.bin      records of many sequences, one after the other
    _logits/<fingerprint>/shards/<name>.json     kind, keys, offsets and checksum: written last

A shard exists once its index does. Its name is the hash of its content, so writers need no lock:
two captures of the same sequences write the same or harmlessly redundant shards. Kinds: "train"
(for losses) and "eval" (for measuring later models against the teacher).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.storage import Store
from trainer.fingerprint import fingerprint
from trainer.logits.codec import VERSION, Records, decode, encode


class CacheMismatch(ValueError):
    """The cache holds something else than what is asked for."""


def open_cache(root: Store, identity: dict[str, Any]) -> Store:
    """The cache of this identity under `root`; its identity is written if it is new.

    Raises CacheMismatch, naming the difference, if the folder holds another identity.
    """
    cache = root.sub(fingerprint(identity))
    payload = json.dumps(identity, sort_keys=True, indent=1).encode()
    if not cache.create("identity.json", payload):
        check_identity(cache, identity)
    return cache


def check_identity(cache: Store, identity: dict[str, Any]) -> None:
    """Raises CacheMismatch with the first difference between the cache's identity and this one."""
    found = cache.read_json("identity.json")
    for name in sorted(set(found) | set(identity)):
        if found.get(name) != identity.get(name):
            raise CacheMismatch(
                f"{cache.url}: logit cache of another {name}: it has {found.get(name)!r}, "
                f"asked for {identity.get(name)!r}"
            )


def write_shard(
    cache: Store, kind: str, keys: Sequence[bytes], records: Iterable[Records]
) -> tuple[str, int]:
    """Publishes one shard: `records[i]` of the sequence `keys[i]`. Returns its name and bytes."""
    blobs = [encode(item) for item in records]
    if len(blobs) != len(keys):
        raise ValueError(f"{len(keys)} keys but {len(blobs)} records")
    offsets = np.cumsum([0] + [len(blob) for blob in blobs])
    data = b"".join(blobs)
    digest = hashlib.blake2b(data, digest_size=16)
    digest.update(b"".join(keys))
    name = f"{kind}-{digest.hexdigest()}"
    index = {
        "format": VERSION,
        "kind": kind,
        "keys": [key.hex() for key in keys],
        "offsets": offsets.tolist(),
        "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest(),
    }
    cache.write_bytes(f"shards/{name}.bin", data)
    cache.write_bytes(f"shards/{name}.json", json.dumps(index).encode())
    return name, len(data)


class CacheReader:
    """Random access to the records of one kind by sequence key."""

    def __init__(self, cache: Store, kind: str) -> None:
        """Reads the indexes (not the records). Raises ValueError for another format version."""
        self.cache = cache
        self.kind = kind
        self._where: dict[bytes, tuple[str, int, int]] = {}
        self._maps: dict[str, NDArray[np.uint8]] = {}
        self._sums: dict[str, str] = {}
        for entry in cache.list("shards"):
            if not (entry.startswith(f"{kind}-") and entry.endswith(".json")):
                continue
            index = cache.read_json(f"shards/{entry}")
            if index["format"] != VERSION:
                raise ValueError(
                    f"{cache.path('shards', entry)}: format {index['format']}, this version reads "
                    f"{VERSION}; capture it again"
                )
            name = entry.removesuffix(".json")
            self._sums[name] = index["blake2b"]
            for i, key in enumerate(index["keys"]):
                span = (name, index["offsets"][i], index["offsets"][i + 1])
                self._where.setdefault(bytes.fromhex(key), span)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of `keys` that the cache does not hold, sorted, each once."""
        return sorted({key for key in keys if key not in self._where})

    def read(self, key: bytes) -> Records:
        """The records of one sequence. Raises KeyError, naming the way out, if it is not there."""
        try:
            name, start, stop = self._where[key]
        except KeyError:
            raise KeyError(
                f"sequence {key.hex()} is not in the logit cache {self.cache.url}; "
                "run the capture stage"
            ) from None
        if name not in self._maps:
            path = self.cache.fetch(f"shards/{name}.bin")
            data = np.memmap(path, dtype=np.uint8, mode="r")
            if hashlib.blake2b(data.data, digest_size=16).hexdigest() != self._sums[name]:
                raise ValueError(
                    f"{self.cache.path('shards', name)}.bin is damaged; delete its .json beside it "
                    "and run with --redo capture, which captures its sequences again"
                )
            self._maps[name] = data
        return decode(memoryview(self._maps[name][start:stop]))  # type: ignore[arg-type]
