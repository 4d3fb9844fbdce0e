"""Token sequences and a teacher's records of them, as an evaluation takes them.

Position t is about the prediction of token t + 1; `loss_mask[t] = 1` says that it counts.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quant.logits import place


class Batch(Protocol):
    """Token sequences (numpy): ids and positions int64 `[batch, seq]`, loss_mask float32."""

    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def position_ids(self) -> np.ndarray: ...
    @property
    def loss_mask(self) -> np.ndarray: ...


class TeacherRecords(Protocol):
    """A teacher's stored distributions of one batch (numpy), meaningful where loss_mask is 1.

    ids int32, logprobs float32 `[batch, seq, k]`; tail, entropy, true_logprob float32
    `[batch, seq]`; natural logs of the full softmax.
    """

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def logprobs(self) -> np.ndarray: ...
    @property
    def tail(self) -> np.ndarray: ...
    @property
    def entropy(self) -> np.ndarray: ...
    @property
    def true_logprob(self) -> np.ndarray: ...


class DataHash:
    """A running blake2b-128 over sequences in order: ids, positions and loss masks.

    The same sequences have the same hash however they are cut into batches.
    """

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16)
        self.batch_sizes: list[int] = []

    def add(self, batch: Batch) -> str:
        """Take one more batch; returns the hash, in hex, of all up to here."""
        columns = (
            np.ascontiguousarray(batch.input_ids, "<i8"),
            np.ascontiguousarray(batch.position_ids, "<i8"),
            np.ascontiguousarray(batch.loss_mask, "<f4"),
        )
        for row in zip(*columns, strict=True):
            self._state.update(len(row[0]).to_bytes(8, "little"))
            for column in row:
                self._state.update(column.tobytes())
        self.batch_sizes.append(len(columns[0]))
        return self.hex

    @property
    def hex(self) -> str:
        """The hash of all batches so far."""
        return self._state.hexdigest()


def aligned(
    batches: Iterable[Batch], records: Iterable[TeacherRecords] | None
) -> Iterator[tuple[Batch, TeacherRecords | None]]:
    """Each batch with its records. Raises ValueError when they differ in shape or number."""
    if records is None:
        yield from ((batch, None) for batch in batches)
        return
    missing: Any = object()
    for batch, record in itertools.zip_longest(batches, records, fillvalue=missing):
        if batch is missing or record is missing:
            less = "batches than teacher records" if batch is missing else "records than batches"
            raise ValueError(f"fewer {less}: both must come from the same sequences")
        if record.ids.shape[:2] != batch.input_ids.shape:
            raise ValueError(
                f"teacher records are {list(record.ids.shape[:2])}, "
                f"their batch is {list(batch.input_ids.shape)}"
            )
        yield batch, record


def inputs(batch: Batch, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `[batch, seq]`, counted bool `[batch, seq]`, and the counted positions' next tokens.

    Raises ValueError when a last position counts.
    """
    ids = place(batch.input_ids, device)
    counted = place(batch.loss_mask, device) > 0
    if bool(counted[:, -1].any()):
        raise ValueError("loss_mask counts a last position: its next token is not in the sequence")
    return ids, counted, ids.roll(-1, dims=1)[counted]


def sparse(
    records: TeacherRecords, counted: Tensor, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Records at the counted positions: ids int64, logprobs `[tokens, k]`, tail `[tokens]`."""
    return (
        place(records.ids, device)[counted],
        place(records.logprobs, device).float()[counted],
        place(records.tail, device).float()[counted],
    )
