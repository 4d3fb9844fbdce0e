"""One sequence's teacher records as bytes, and back. Pure functions on numpy arrays.

Layout (little-endian): a header, then per position k ids (2 bytes each for vocabularies up to
65,536, else 3), k log-probabilities (float16), one log tail mass per temperature (float32) and, in
records for evaluation, the exact entropy and the true token's log-probability (float32). Each field
is stored for all positions together. The first byte after the magic is the format's version.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"SHLC"
VERSION = 1
_HEADER = struct.Struct("<4sBBHIHH")  # magic, version, flags, k, positions, temperatures, 0
_EVAL = 1
_WIDE = 2

MAX_VOCABULARY = 1 << 20


@dataclass(frozen=True)
class Records:
    """The teacher's distributions at consecutive positions.

    ids: int32 [positions, k], most likely first. log_probs: float32 [positions, k], natural log of
    the full softmax at temperature 1. log_tails: float32 [positions, temperatures], log of the sum
    over all other ids of p^(1/T); minus infinity without a tail. entropy (nats) and true_log_prob:
    float32 [positions], in records for evaluation only.
    """

    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    log_tails: NDArray[np.float32]
    entropy: NDArray[np.float32] | None = None
    true_log_prob: NDArray[np.float32] | None = None


def error_bound(log_probs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest difference of a decoded log-probability: half a unit of float16's last place."""
    return np.maximum(np.abs(log_probs) * np.float32(2.0**-11), np.float32(2.0**-25))


def encode(records: Records) -> bytes:
    """The bytes of one sequence. Raises ValueError for ids beyond the largest vocabulary."""
    positions, k = records.ids.shape
    highest = int(records.ids.max(initial=0))
    if records.ids.min(initial=0) < 0 or highest >= MAX_VOCABULARY:
        raise ValueError(f"token id {highest} is beyond the largest vocabulary, {MAX_VOCABULARY}")
    wide = highest > 0xFFFF
    is_eval = records.entropy is not None
    header = _HEADER.pack(
        _MAGIC,
        VERSION,
        _EVAL * is_eval | _WIDE * wide,
        k,
        positions,
        records.log_tails.shape[1],
        0,
    )
    ids = records.ids.astype("<u4")
    parts = [header, (ids & 0xFFFF).astype("<u2").tobytes()]
    if wide:
        parts.append((ids >> 16).astype("u1").tobytes())
    parts.append(records.log_probs.astype("<f2").tobytes())
    parts.append(records.log_tails.astype("<f4").tobytes())
    if records.entropy is not None and records.true_log_prob is not None:
        parts.append(records.entropy.astype("<f4").tobytes())
        parts.append(records.true_log_prob.astype("<f4").tobytes())
    return b"".join(parts)


def decode(data: bytes | memoryview) -> Records:
    """The records in `data`. Raises ValueError when it is no record of this format version."""
    if len(data) < _HEADER.size:
        raise ValueError("record of the logit cache is cut short; run the capture stage again")
    magic, version, flags, k, positions, temperatures, _ = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != VERSION:
        raise ValueError(
            f"no record of the logit cache in format {VERSION} (found {magic!r}, {version}); "
            "capture it again with this version"
        )
    offset = _HEADER.size

    def take(dtype: str, *shape: int) -> NDArray:
        nonlocal offset
        count = int(np.prod(shape))
        values = np.frombuffer(data, dtype, count, offset).reshape(shape)
        offset += values.nbytes
        return values

    ids = take("<u2", positions, k).astype(np.int32)
    if flags & _WIDE:
        ids |= take("u1", positions, k).astype(np.int32) << 16
    log_probs = take("<f2", positions, k).astype(np.float32)
    log_tails = take("<f4", positions, temperatures).astype(np.float32)
    if not flags & _EVAL:
        return Records(ids, log_probs, log_tails)
    entropy = take("<f4", positions).astype(np.float32)
    true_log_prob = take("<f4", positions).astype(np.float32)
    return Records(ids, log_probs, log_tails, entropy, true_log_prob)
