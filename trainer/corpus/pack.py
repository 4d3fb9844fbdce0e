"""Documents become sequences of fixed length: pure numpy.

    tokens          a a a E b b | b b E c E P      E ends a document, P pads the last sequence
    document_start  1 0 0 0 1 0 | 1 0 0 1 0 1      packing: documents
    loss_mask       1 1 1 0 1 0 | 1 1 0 1 0 0      1 where the next token is of the same document

A document that does not fit continues in the next sequence, as a document of its own there. With
packing: concat only the first token of a sequence starts a document, and loss counts across them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Packing = Literal["documents", "concat"]


@dataclass(frozen=True)
class Packed:
    """Sequences: input_ids int32, document_start and loss_mask uint8, all [n, L]; documents int64
    [n], the number of the document that the first token belongs to.
    """

    input_ids: NDArray[np.int32]
    document_start: NDArray[np.uint8]
    loss_mask: NDArray[np.uint8]
    documents: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, chosen: NDArray[np.int64] | slice) -> Packed:
        """The chosen sequences."""
        return Packed(
            self.input_ids[chosen],
            self.document_start[chosen],
            self.loss_mask[chosen],
            self.documents[chosen],
        )

    def keys(self) -> NDArray[np.uint8]:
        """blake2b-128 of each sequence's ids, document starts and loss mask: uint8 [n, 16]."""
        digests = bytearray()
        for ids, start, mask in zip(
            self.input_ids.astype("<i4"), self.document_start, self.loss_mask, strict=True
        ):
            state = hashlib.blake2b(ids.tobytes(), digest_size=16)
            state.update(start.tobytes())
            state.update(mask.tobytes())
            digests += state.digest()
        return np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, 16)


def pack(documents: Sequence[NDArray[np.int32]], length: int, packing: Packing, pad: int) -> Packed:
    """Pack token ids (each document with its end token) into sequences of `length` in order.

    The last sequence is padded with `pad`. Sequences without any loss position are dropped.
    """
    return _with_loss(_cut(documents, length, packing, pad))


def take_part(
    documents: Sequence[NDArray[np.int32]], count: int, length: int, packing: Packing, pad: int
) -> tuple[Packed, int] | None:
    """Exactly `count` full sequences of the first documents, and how many documents they use up.

    What is left of the last document is dropped, so that it is in no other part. None when the
    documents do not suffice.
    """
    tokens = sum(len(document) for document in documents)
    full = _cut(documents, length, packing, pad).take(slice(tokens // length))
    with_loss = np.flatnonzero(full.loss_mask.any(axis=1))[:count]
    if len(with_loss) < count:
        return None
    end = (int(with_loss[-1]) + 1) * length if count else 0
    ends = np.cumsum([len(document) for document in documents])
    used = int(np.searchsorted(ends, end, side="left")) + 1 if count else 0
    return full.take(with_loss), used


def position_ids(document_start: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Positions [n, L] that restart at 0 where a document starts."""
    index = np.arange(document_start.shape[-1], dtype=np.int64)
    started = np.where(document_start != 0, index, 0)
    return index - np.maximum.accumulate(started, axis=-1)


def _cut(documents: Sequence[NDArray[np.int32]], length: int, packing: Packing, pad: int) -> Packed:
    sizes = np.array([len(document) for document in documents], dtype=np.int64)
    tokens = int(sizes.sum())
    count = -(-tokens // length)
    ids = np.full(count * length, pad, dtype=np.int32)
    if tokens:
        np.concatenate(documents, out=ids[:tokens])
    starts = np.zeros(count * length, dtype=np.uint8)
    starts[::length] = 1
    ends = np.cumsum(sizes)
    if packing == "documents":
        starts[ends[ends < count * length]] = 1  # the padding is a document of its own
    loss = np.zeros(count * length, dtype=np.uint8)
    follows = np.arange(1, count * length) < tokens
    loss[:-1] = (starts[1:] == 0) & follows
    shape = (count, length)
    first = np.searchsorted(ends, np.arange(count) * length, side="right")
    return Packed(ids.reshape(shape), starts.reshape(shape), loss.reshape(shape), first)


def _with_loss(packed: Packed) -> Packed:
    return packed.take(np.flatnonzero(packed.loss_mask.any(axis=1)))
