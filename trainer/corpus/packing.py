"""Documents become sequences of fixed length: pure numpy.

    tokens          a a a E b b | b b E c E P      E ends a document, P pads the last sequence
    document_start  1 0 0 0 1 0 | 1 0 0 1 0 1      packing: documents
    loss_mask       1 1 1 0 1 0 | 1 1 0 1 0 0      1 where the next token is of the same document

A document that does not fit continues in the next sequence, as a document of its own there. With
packing: concat only the first token of a sequence starts a document, and loss counts across them.

A labelled document says of each token whether it is learnt, and is not torn: one that does not fit
starts the next sequence, after padding, and one longer than a sequence is cut at its end.

    tokens          u u A A | u A A P | u u u A      u is given, A learnt; the third was longer
    loss_mask       0 1 1 0 | 1 1 0 0 | 0 0 1 0
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Packing = Literal["documents", "concat"]


@dataclass(frozen=True)
class Labelled:
    """A document that is learnt in part and stays whole: ids int32 [n], learnt bool [n]."""

    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)


Document = NDArray[np.int32] | Labelled


@dataclass(frozen=True)
class Packed:
    """Sequences: input_ids int32, document_start and loss_mask uint8, all [n, L]; documents int64
    [n], the number of the document that the first token belongs to. cut: labelled documents that
    were longer than a sequence.
    """

    input_ids: NDArray[np.int32]
    document_start: NDArray[np.uint8]
    loss_mask: NDArray[np.uint8]
    documents: NDArray[np.int64]
    cut: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, chosen: NDArray[np.int64] | slice) -> Packed:
        """The chosen sequences."""
        return Packed(
            self.input_ids[chosen],
            self.document_start[chosen],
            self.loss_mask[chosen],
            self.documents[chosen],
            self.cut,
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


def pack(documents: Sequence[Document], length: int, packing: Packing, pad: int) -> Packed:
    """Pack token ids (each document with its end token) into sequences of `length` in order.

    The last sequence is padded with `pad`. Sequences without any loss position are dropped.
    """
    packed = _cut(_lay(documents, length, pad), length, packing, pad)
    return packed.take(np.flatnonzero(packed.loss_mask.any(axis=1)))


def take_part(
    documents: Sequence[Document], count: int, length: int, packing: Packing, pad: int
) -> tuple[Packed, int] | None:
    """Exactly `count` full sequences of the first documents, and how many documents they use up.

    Full is also one that is padded because the next document is whole and does not fit. What is
    left of the last document is dropped, so that it is in no other part. None when the documents
    do not suffice.
    """
    laid = _lay(documents, length, pad)
    ends = np.cumsum([len(piece) for piece in laid.pieces])
    full = _cut(laid, length, packing, pad).take(slice(int(ends[-1]) // length if len(ends) else 0))
    with_loss = np.flatnonzero(full.loss_mask.any(axis=1))[:count]
    if len(with_loss) < count:
        return None
    used = 0
    if count:
        end = (int(with_loss[-1]) + 1) * length
        used = int(laid.documents[np.searchsorted(ends, end, side="left")]) + 1
    cut = int((laid.cut < used).sum())
    return replace(full.take(with_loss), cut=cut), used


def laid_tokens(documents: Sequence[Document], length: int) -> int:
    """Tokens that documents take in sequences of `length`, with the padding between them."""
    return sum(map(len, _lay(documents, length, 0).pieces))


def position_ids(document_start: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Positions [n, L] that restart at 0 where a document starts."""
    index = np.arange(document_start.shape[-1], dtype=np.int64)
    started = np.where(document_start != 0, index, 0)
    return index - np.maximum.accumulate(started, axis=-1)


@dataclass(frozen=True)
class _Laid:
    """Documents one after the other, with padding before those that would be torn.

    pieces: token ids. learnt: bool of each token, None where all are. documents: int64 [pieces],
    which one a piece is; padding counts as what is before it. cut: int64, those that were cut.
    """

    pieces: Sequence[NDArray[np.int32]]
    learnt: NDArray[np.bool_] | None
    documents: NDArray[np.int64]
    cut: NDArray[np.int64]


def _lay(documents: Sequence[Document], length: int, pad: int) -> _Laid:
    if not any(isinstance(document, Labelled) for document in documents):
        plain = [document for document in documents if not isinstance(document, Labelled)]
        return _Laid(plain, None, np.arange(len(plain)), np.zeros(0, np.int64))
    pieces: list[NDArray[np.int32]] = []
    learnt: list[NDArray[np.bool_]] = []
    numbers: list[int] = []
    cut: list[int] = []
    filled = 0  # of the sequence that is being filled
    for number, document in enumerate(documents):
        if isinstance(document, Labelled):
            ids, marks = document.ids[:length], document.learnt[:length]
            if len(ids) > length - filled:
                pieces.append(np.full(length - filled, pad, np.int32))
                learnt.append(np.zeros(length - filled, bool))
                numbers.append(number - 1)
                filled = 0
            if len(document) > length:
                cut.append(number)
        else:
            ids, marks = document, np.ones(len(document), bool)
        pieces.append(ids)
        learnt.append(marks)
        numbers.append(number)
        filled = (filled + len(ids)) % length
    return _Laid(pieces, np.concatenate(learnt), np.array(numbers), np.array(cut, np.int64))


def _cut(laid: _Laid, length: int, packing: Packing, pad: int) -> Packed:
    sizes = np.array([len(piece) for piece in laid.pieces], dtype=np.int64)
    tokens = int(sizes.sum())
    count = -(-tokens // length)
    ids = np.full(count * length, pad, dtype=np.int32)
    if tokens:
        np.concatenate(laid.pieces, out=ids[:tokens])
    starts = np.zeros(count * length, dtype=np.uint8)
    starts[::length] = 1
    ends = np.cumsum(sizes)
    if packing == "documents":
        starts[ends[ends < count * length]] = 1  # the padding is a document of its own
    loss = np.zeros(count * length, dtype=np.uint8)
    follows = np.arange(1, count * length) < tokens
    if laid.learnt is not None:
        follows[: max(tokens - 1, 0)] &= laid.learnt[1:]
    loss[:-1] = (starts[1:] == 0) & follows
    shape = (count, length)
    first = laid.documents[np.searchsorted(ends, np.arange(count) * length, side="right")]
    return Packed(
        ids.reshape(shape), starts.reshape(shape), loss.reshape(shape), first, len(laid.cut)
    )
