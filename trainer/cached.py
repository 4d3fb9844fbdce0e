"""The teacher as a training knows it: what its logit cache holds of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.storage import Store
from trainer.logits.coding import coding_of, train_kinds
from trainer.logits.positions import read_along
from trainer.logits.reader import CacheReader
from trainer.logits.records import Records
from trainer.logits.store import CacheMismatch
from trainer.spec import CacheSpec


@dataclass(frozen=True)
class CachedTeacher:
    """The records of sequences, for a loss at one temperature.

    readers: one for each set of records; epoch e reads set e modulo their number. length: positions
    of a sequence. tail: which of the temperatures of the records the log tail is of. positions:
    which of a sequence have records, "all" or "loss".
    """

    readers: Sequence[CacheReader]
    length: int
    tail: int = 0
    positions: str = "all"

    @staticmethod
    def for_training(
        cache: Store, spec: CacheSpec, vocab: int, length: int, temperature: float
    ) -> CachedTeacher:
        """For a loss at `temperature`, one of those of the spec, over `vocab` ids.

        Raises CacheMismatch if the records are of another coding.
        """
        readers = [_open(cache, spec, vocab, kind) for kind in train_kinds(spec)]
        tail = spec.temperatures.index(temperature)
        return CachedTeacher(readers, length, tail, spec.positions)

    @staticmethod
    def for_evaluation(cache: Store, spec: CacheSpec, vocab: int, length: int) -> CachedTeacher:
        """For measuring models against the teacher, at temperature 1."""
        readers = [_open(cache, spec, vocab, "eval")]
        return CachedTeacher(readers, length, positions=spec.positions)

    def read(self, keys: Sequence[bytes], epochs: NDArray[np.int64], loss_mask: NDArray) -> Records:
        """The records of `keys`, the i-th as epoch `epochs[i]` reads it, along the positions.

        loss_mask: [sequences, seq], not 0 where a position counts; where it does not, a row may
        be that of another position. Raises MissingRecord for a sequence that is not there,
        CacheDamaged for a damaged one.
        """
        sets = epochs % len(self.readers)
        # A step may lie across two epochs, and then a micro-batch in two sets.
        edges = [0, *(np.flatnonzero(np.diff(sets)) + 1).tolist(), len(sets)]
        parts = [
            self._read(self.readers[sets[start]], keys[start:stop], loss_mask[start:stop])
            for start, stop in zip(edges[:-1], edges[1:], strict=True)
        ]
        return parts[0] if len(parts) == 1 else _join(parts)

    def _read(self, reader: CacheReader, keys: Sequence[bytes], loss_mask: NDArray) -> Records:
        if self.positions == "all":
            return reader.read_many(keys, self.length)
        return read_along(reader, keys, loss_mask, self.positions)

    def close(self) -> None:
        """Closes the readers."""
        for reader in self.readers:
            reader.close()


def _open(cache: Store, spec: CacheSpec, vocab: int, kind: str) -> CacheReader:
    reader, wanted = CacheReader(cache, kind), coding_of(spec, vocab, kind)
    if reader.coding is not None and reader.coding != wanted:
        raise CacheMismatch(
            f"{cache.url}: holds records of {reader.coding}, asked for {wanted}; remove it with: "
            f"stillhouse cache rm {cache.url}"
        )
    return reader


def _join(parts: Sequence[Records]) -> Records:
    """Records for training one after the other along the positions, as wide as the widest."""
    width = max(part.ids.shape[1] for part in parts)
    ids, log_probs = [], []
    for part in parts:
        more = width - part.ids.shape[1]
        ids.append(np.pad(part.ids, ((0, 0), (0, more))))
        ids[-1][:, width - more :] = part.ids[:, :1]
        log_probs.append(np.pad(part.log_probs, ((0, 0), (0, more)), constant_values=-np.inf))
    tails = [part.log_tails for part in parts]
    return Records(np.concatenate(ids), np.concatenate(log_probs), np.concatenate(tails))
