"""The index of one shard: which sequences it holds, where, and what their bytes must be.

Little-endian: a header, then keys uint8 [n, 16], lengths uint32 [n] and checksums uint64 [n] of n
records, which lie back to back in the shard's other file. A shard is named by the hash of its
index, and the index holds the hash of the records, the cache and the codebook that they need: so
a file that was changed, cut, exchanged or taken from elsewhere does not fit its name.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.logits.records import VERSION

KEY_BYTES = 16
# magic, version, bytes per key, kind, cache, codebook, records, bytes and hash of the records
_HEADER = struct.Struct("<4sHH16s16s16sQQ16s")
_MAGIC = b"SHLI"
_ROW = KEY_BYTES + 4 + 8

MAX_SEQUENCES = 1 << 21
MAX_INDEX_BYTES = _HEADER.size + MAX_SEQUENCES * _ROW
_KIND = re.compile(r"eval|train([1-9][0-9]{0,3})?")
_NAME = re.compile(rf"({_KIND.pattern})-[0-9a-f]{{32}}")


@dataclass(frozen=True)
class Index:
    """What one shard holds.

    cache: fingerprint of the cache's identity, in hex. codebook: hash of the codebook. size and
    digest: bytes and blake2b-128 of the records. keys: uint8 [n, 16]; lengths: uint32 [n], bytes
    of each record; sums: uint64 [n], see `checksum`.
    """

    kind: str
    cache: str
    codebook: bytes
    size: int
    digest: bytes
    keys: NDArray[np.uint8]
    lengths: NDArray[np.uint32]
    sums: NDArray[np.uint64]

    def starts(self) -> NDArray[np.int64]:
        """First byte of each record: int64 [n]."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        return ends - self.lengths


def checksum(key: bytes, record: bytes | memoryview) -> int:
    """XXH3-64 of a sequence key and its record: other bytes, or another's bytes, do not fit."""
    state = xxhash.xxh3_64(key)
    state.update(record)
    return int(state.intdigest())


def digest(*parts: bytes | memoryview) -> bytes:
    """blake2b-128 of the parts, one after the other."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.digest()


def check_kind(kind: str) -> None:
    """Raises ValueError for a kind of records that cannot be part of a file's name."""
    if not _KIND.fullmatch(kind):
        raise ValueError(f"kind of records {kind!r}; may be eval, train, train1, train2 and so on")


def kind_of(name: str) -> str | None:
    """The kind in a shard's name; None for what is no shard's name."""
    match = _NAME.fullmatch(name)
    return match[1] if match else None


def shard_name(kind: str, packed: bytes) -> str:
    """The name of the shard with this packed index."""
    return f"{kind}-{digest(packed).hex()}"


def make_index(
    kind: str, cache: str, codebook: bytes, keys: Sequence[bytes], blobs: Sequence[bytes]
) -> Index:
    """The index of records `blobs` of the sequences `keys`. Raises ValueError if they do not fit
    each other, or into a shard."""
    check_kind(kind)
    if len(keys) != len(blobs):
        raise ValueError(f"{len(keys)} keys but {len(blobs)} records")
    if not 1 <= len(keys) <= MAX_SEQUENCES:
        raise ValueError(f"a shard of {len(keys)} records; may be 1 to {MAX_SEQUENCES}")
    if any(len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"a sequence key is not of {KEY_BYTES} bytes")
    if len(set(keys)) != len(keys):
        raise ValueError("a sequence key stands twice in one shard")
    if not all(1 <= len(blob) < 1 << 32 for blob in blobs):
        raise ValueError("a record is empty or of 4 GiB or more")
    return Index(
        kind,
        cache,
        codebook,
        sum(map(len, blobs)),
        digest(*blobs),
        np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
        np.array([len(blob) for blob in blobs], np.uint32),
        np.array([checksum(*pair) for pair in zip(keys, blobs, strict=True)], np.uint64),
    )


def rows_in(size: int) -> int:
    """As many sequences as an index of `size` bytes has room for."""
    return max(size - _HEADER.size, 0) // _ROW


def pack(index: Index) -> bytes:
    """An index as it is stored."""
    header = _HEADER.pack(
        _MAGIC,
        VERSION,
        KEY_BYTES,
        index.kind.encode(),
        bytes.fromhex(index.cache),
        index.codebook,
        len(index.keys),
        index.size,
        index.digest,
    )
    columns = (index.keys, index.lengths.astype("<u4"), index.sums.astype("<u8"))
    return b"".join([header, *(column.tobytes() for column in columns)])


def unpack(data: bytes, name: str) -> Index:
    """The index of the shard `name`. Raises ValueError, saying what is wrong with it.

    Allocates no more than `data` has bytes, whatever it claims.
    """
    if not data:
        raise ValueError("is empty")
    if shard_name(name.rpartition("-")[0], data) != name:
        raise ValueError("is damaged: its content is not what its name says")
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise ValueError("is no index of a logit cache")
    _, version, key_bytes, kind, cache, codebook, count, size, sha = _HEADER.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"is of format {version}, and this version reads {VERSION}")
    if kind.rstrip(b"\0") != name.rpartition("-")[0].encode():
        raise ValueError("is of another kind of records than its name says")
    if key_bytes != KEY_BYTES or _HEADER.size + count * _ROW != len(data):
        raise ValueError(f"claims {count} records, which its {len(data)} bytes do not hold")
    columns: list[NDArray[Any]] = []
    at = _HEADER.size
    for dtype, width in (("u1", KEY_BYTES), ("<u4", 1), ("<u8", 1)):
        columns.append(np.frombuffer(data, dtype, count * width, at))
        at += columns[-1].nbytes
    keys, lengths, sums = columns
    if not count or not lengths.all() or int(lengths.sum(dtype=np.uint64)) != size:
        raise ValueError("claims records that do not add up to the shard")
    return Index(
        kind.rstrip(b"\0").decode(),
        cache.hex(),
        codebook,
        size,
        sha,
        keys.reshape(-1, KEY_BYTES),
        lengths,
        sums,
    )
