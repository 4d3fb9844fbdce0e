"""What all records of one kind in a cache share: the coding, the numbering of ids, code tables.

Fitted once, on the first records of a cache, and kept with them. Later records that look
otherwise are coded as exactly, only in more bytes. As a file it is bound to its
cache and family, and checked whole.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trainer.logits.contexts import CENTROIDS, CONTEXTS, TAIL_BUCKETS, UNIT
from trainer.logits.index import digest
from trainer.logits.rans import PRECISION, SYMBOLS, check_frequencies, code_table, decode_tables
from trainer.logits.records import MAX_VOCABULARY, VERSION, Coding

_MAGIC = b"SHCB"
FORMAT = 1
_HEAD = struct.Struct("<4sII")  # magic, format, bytes of the JSON header
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Codebook:
    """See the module's docstring.

    order: int32 [vocab], id by number. centroids: float64 [TAIL_BUCKETS, CENTROIDS], the
    probability that stands for a level. table_of: int64 [CONTEXTS], freqs: int64
    [tables, SYMBOLS], as in `trainer.logits.rans`.
    """

    coding: Coding
    order: NDArray[np.int32]
    centroids: NDArray[np.float64]
    table_of: NDArray[np.int64]
    freqs: NDArray[np.int64]

    @cached_property
    def ranks(self) -> NDArray[np.int32]:
        """Number by id: int32 [vocab]."""
        ranks = np.empty_like(self.order)
        ranks[self.order] = np.arange(len(self.order), dtype=np.int32)
        return ranks

    @cached_property
    def codes(self) -> NDArray[np.uint64]:
        """The coding tables, one after the other."""
        return code_table(self.freqs)

    @cached_property
    def code_bases(self) -> NDArray[np.uint64]:
        """Where the coding table of each context starts: uint64 [CONTEXTS]."""
        return self.table_of.astype(np.uint64) * np.uint64(SYMBOLS)

    @cached_property
    def tables(self) -> NDArray[np.uint32]:
        """The decoding tables, one after the other: uint32 [tables * 2^PRECISION]."""
        return decode_tables(self.freqs)

    @cached_property
    def bases(self) -> NDArray[np.uint64]:
        """Where the decoding table of each context starts: uint64 [CONTEXTS]."""
        return self.table_of.astype(np.uint64) << np.uint64(PRECISION)

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """Centroids in fixed-point units, the same on every machine: int64."""
        return np.rint(self.centroids * (UNIT / self.coding.step**2)).astype(np.int64)

    @cached_property
    def log_values(self) -> NDArray[np.float32]:
        """Log-probability by tail bucket and level, or by count of draws: float32."""
        if self.coding.method == "sample":
            counts = np.maximum(np.arange(self.coding.k + 1), 1)
            return np.log(counts / self.coding.k).astype(np.float32)[None]
        levels = np.arange(int(1.01 / self.coding.step) + 2)
        values = np.repeat((levels[None] * self.coding.step) ** 2, TAIL_BUCKETS, axis=0)
        few = min(CENTROIDS, len(levels))
        values[:, :few] = self.centroids[:, :few]
        return np.log(np.minimum(values, 1.0)).astype(np.float32)

    def to_bytes(self) -> bytes:
        """The codebook as it is stored: a JSON header, packed arrays, a checksum."""
        plain = np.array_equal(self.order, np.arange(self.coding.vocab))
        arrays = [
            b"" if plain else self.order.astype("<i4").tobytes(),
            self.centroids.astype("<f8").tobytes(),
            self.table_of.astype("<u2").tobytes(),
            self.freqs.astype("<u2").tobytes(),
        ]
        header = json.dumps(
            {"coding": asdict(self.coding), "sizes": [len(array) for array in arrays]}
        ).encode()
        head = _HEAD.pack(_MAGIC, FORMAT, len(header)) + header
        body = head + zlib.compress(_planes(arrays), 9)
        return body + hashlib.blake2b(body, digest_size=16).digest()

    @staticmethod
    def from_bytes(data: bytes) -> Codebook:
        """The inverse of `to_bytes`. Raises ValueError for anything else."""
        if len(data) < _HEAD.size + 16 or data[:4] != _MAGIC:
            raise ValueError("not a codebook of a logit cache")
        if hashlib.blake2b(data[:-16], digest_size=16).digest() != data[-16:]:
            raise ValueError("a damaged codebook (its checksum differs)")
        _, version, size = _HEAD.unpack_from(data)
        if version != FORMAT:
            raise ValueError(f"a codebook of format {version}; this version reads {FORMAT}")
        try:
            header = json.loads(data[_HEAD.size : _HEAD.size + size])
            values = header["coding"]
            coding = Coding(**{**values, "temperatures": tuple(values["temperatures"])})
            check_coding(coding)
            inflate = zlib.decompressobj()
            raw = inflate.decompress(data[_HEAD.size + size : -16], _MOST_BYTES)
            order, centroids, table_of, freqs = _unplane(raw, header["sizes"])
            book = Codebook(
                coding,
                np.frombuffer(order, "<i4").astype(np.int32)
                if order
                else np.arange(coding.vocab, dtype=np.int32),
                np.frombuffer(centroids, "<f8").reshape(TAIL_BUCKETS, CENTROIDS),
                np.frombuffer(table_of, "<u2").astype(np.int64),
                np.frombuffer(freqs, "<u2").astype(np.int64).reshape(-1, SYMBOLS),
            )
            book._check()
        except (KeyError, TypeError, OverflowError, RecursionError, zlib.error) as error:
            raise ValueError(f"a damaged codebook ({error})") from None
        return book

    def _check(self) -> None:
        """Raises ValueError for what no fit makes, which would lead a decoder astray."""
        coding = self.coding
        check_frequencies(self.freqs)
        sound = (
            len(self.order) == coding.vocab
            and np.array_equal(np.sort(self.order), np.arange(coding.vocab))
            and len(self.table_of) == CONTEXTS
            and int(self.table_of.max()) < len(self.freqs)
            and bool((self.centroids > 0).all())
        )
        if not sound:
            raise ValueError("a codebook that contradicts itself")


def check_coding(coding: Coding) -> None:
    """Raises ValueError for a coding that no spec makes, TypeError for values of other types."""
    numbers = (coding.vocab, coding.k, coding.step, coding.keep, *coding.temperatures)
    whole = isinstance(coding.vocab, int) and isinstance(coding.k, int)
    if not (whole and all(isinstance(number, (int, float)) for number in numbers)):
        raise TypeError("values of other types")
    sound = (
        coding.method in ("topk", "sample", "exact")
        and 1 <= coding.vocab <= MAX_VOCABULARY
        and 1 <= coding.k <= 4096
        and 0.0005 <= coding.step <= 1.0
        and 0.0 <= coding.keep <= 16.0
        and bool(coding.temperatures) == (coding.method != "sample")
        and all(1e-3 <= temperature <= 1e3 for temperature in coding.temperatures)
        and (coding.method != "exact" or coding.temperatures == (1.0,))
    )
    if not sound:
        raise ValueError(f"a codebook of a coding that there is not: {coding}")


def _planes(arrays: list[bytes]) -> bytes:
    """The arrays one after the other, the first (of 4-byte numbers) as byte planes."""
    first = np.frombuffer(arrays[0], np.uint8).reshape(-1, 4).T.tobytes()
    return b"".join([first, *arrays[1:]])


def _unplane(raw: bytes, sizes: list[int]) -> list[bytes]:
    """The inverse of `_planes`. Raises ValueError where the sizes do not fit."""
    if len(sizes) != 4 or min(sizes) < 0 or sum(sizes) != len(raw) or sizes[0] % 4:
        raise ValueError("a damaged codebook (its sizes differ)")
    parts, at = [], 0
    for size in sizes:
        parts.append(raw[at : at + size])
        at += size
    parts[0] = np.frombuffer(parts[0], np.uint8).reshape(4, -1).T.tobytes()
    return parts


_FILE_MAGIC = b"SHCB"
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
    header = _HEADER.pack(_FILE_MAGIC, VERSION, family.encode(), bytes.fromhex(cache))
    number = digest(header, body)
    return number, header + number + body


def unpack_codebook(data: bytes, family: str, cache: str) -> tuple[bytes, Codebook]:
    """The hash and the codebook in a file of the cache with fingerprint `cache`.

    Raises ValueError, saying what is wrong with it.
    """
    if not data:
        raise ValueError("is empty")
    if len(data) < _BODY or data[:4] != _FILE_MAGIC:
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
