"""The files of a corpus: Arrow IPC, one record batch per file, so that rows are numpy views.

| column         | type                      |
|----------------|---------------------------|
| input_ids      | fixed_size_list<int32>[L] |
| document_start | fixed_size_list<uint8>[L] |
| loss_mask      | fixed_size_list<uint8>[L] |
| key            | fixed_size_binary[16]     |
| source         | int16                     |
| loss_tokens    | int32                     |
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.storage import Store
from trainer.corpus.packing import Packed


@dataclass(frozen=True)
class FileInfo:
    """A published file: its name, sequences, loss positions, bytes and blake2b-128 hash."""

    name: str
    sequences: int
    loss_tokens: int
    bytes: int
    blake2b: str

    def as_dict(self) -> dict[str, Any]:
        """The entry in the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Table:
    """A file as numpy arrays that view the mapped memory; shapes as in `Packed`."""

    input_ids: NDArray[np.int32]
    document_start: NDArray[np.uint8]
    loss_mask: NDArray[np.uint8]
    keys: NDArray[np.uint8]
    sources: NDArray[np.int16]
    loss_tokens: NDArray[np.int32]


def write_table(store: Store, name: str, packed: Packed, sources: NDArray[np.int16]) -> FileInfo:
    """Publish sequences (at least one) as one file; `sources` int16 [n]."""
    loss_tokens = packed.loss_mask.sum(axis=1, dtype=np.int32)
    length = packed.input_ids.shape[1]
    columns: dict[str, pa.Array] = {
        "input_ids": _fixed_lists(packed.input_ids, length),
        "document_start": _fixed_lists(packed.document_start, length),
        "loss_mask": _fixed_lists(packed.loss_mask, length),
        "key": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(packed), [None, pa.py_buffer(packed.keys().tobytes())]
        ),
        "source": pa.array(sources, type=pa.int16()),
        "loss_tokens": pa.array(loss_tokens, type=pa.int32()),
    }
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getvalue().to_pybytes()
    store.write_bytes(name, data)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return FileInfo(name, len(packed), int(loss_tokens.sum()), len(data), digest)


def read_table(path: Path) -> Table:
    """Map a file into memory; nothing is read before it is used."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    keys = np.frombuffer(batch.column("key").buffers()[1], dtype=np.uint8)
    return Table(
        _matrix(batch.column("input_ids")),
        _matrix(batch.column("document_start")),
        _matrix(batch.column("loss_mask")),
        keys[: 16 * batch.num_rows].reshape(-1, 16),  # Arrow pads buffers
        _flat(batch.column("source")),
        _flat(batch.column("loss_tokens")),
    )


def _fixed_lists(values: NDArray[Any], length: int) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), length)


def _matrix(column: pa.FixedSizeListArray) -> NDArray[Any]:
    return _flat(column.values).reshape(len(column), column.type.list_size)


def _flat(column: pa.Array) -> NDArray[Any]:
    """A view of numbers without nulls; Arrow's own `to_numpy` imports pandas, for a second."""
    values = np.frombuffer(column.buffers()[1], dtype=column.type.to_pandas_dtype())
    return values[column.offset : column.offset + len(column)]
