"""A codebook as a file of the cache: bound to its cache and family, and checked whole."""

from __future__ import annotations

import struct

from trainer.logits.codebook import Codebook
from trainer.logits.index import digest
from trainer.logits.records import VERSION

_MAGIC = b"SHCB"
# magic, version, family, cache; then the hash of these and of the codebook, which follows
_HEADER = struct.Struct("<4sH16s16s")
_BODY = _HEADER.size + 16


def family_of(kind: str) -> str:
    """The kinds that share a codebook: train, train1... are one family."""
    return kind.rstrip("0123456789")


def codebook_path(family: str) -> str:
    """The path in a cache of a family's codebook."""
    return f"codebook-{family}.bin"


def spare_path(family: str, number: bytes) -> str:
    """The path in a cache of the spare copy of the codebook with this hash."""
    return f"codebooks/{family}-{number.hex()}.bin"


def pack_codebook(codebook: Codebook, family: str, cache: str) -> tuple[bytes, bytes]:
    """The hash and the file of a codebook of the cache with fingerprint `cache`."""
    body = codebook.to_bytes()
    header = _HEADER.pack(_MAGIC, VERSION, family.encode(), bytes.fromhex(cache))
    number = digest(header, body)
    return number, header + number + body


def unpack_codebook(data: bytes, family: str, cache: str) -> tuple[bytes, Codebook]:
    """The hash and the codebook in a file of the cache with fingerprint `cache`.

    Raises ValueError, saying what is wrong with it.
    """
    if not data:
        raise ValueError("is empty")
    if len(data) < _BODY or data[:4] != _MAGIC:
        raise ValueError("is damaged: it is no codebook of a logit cache")
    header, number, body = data[: _HEADER.size], data[_HEADER.size : _BODY], data[_BODY:]
    if digest(header, body) != number:
        raise ValueError("is damaged: its checksum does not fit")
    _, version, name, where = _HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(f"is of format {version}, and this version reads {VERSION}")
    if name.rstrip(b"\0") != family.encode():
        raise ValueError("is the codebook of another kind of records")
    if where.hex() != cache:
        raise ValueError(f"belongs to another logit cache, {where.hex()}")
    try:
        return number, Codebook.from_bytes(body)
    except ValueError as error:
        raise ValueError(f"is damaged: {error}") from error
