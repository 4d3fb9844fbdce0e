"""Tensors in a safetensors file: written one by one, read as a memory mapping that can let go.

The format is github.com/huggingface/safetensors: 8 bytes with the header's length, the header
(JSON: dtype, shape and data_offsets by name), the data without holes. The library's own mapping
keeps every page that was touched resident; this one can give back those of a tensor that has been
copied, so that loading a model needs its size in memory once, not twice.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.storage.strict_json import broken, parse_object, shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 32 << 20  # bytes; about 200 for each tensor
NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
AGAIN = "copy the file again"


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: its dtype, shape, and first byte behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path,
    slots: Mapping[str, Slot],
    groups: Iterable[Callable[[], Mapping[str, Tensor]]],
) -> None:
    """Write the tensors that `groups` make, one group in memory at a time, into a new file.

    slots: dtype and shape of every tensor, in any order and with any start. The same tensors give
    the same bytes. Raises ValueError when the groups do not make exactly the tensors in `slots`.
    """
    # Wide dtypes first, so that every tensor is aligned; then in the order given.
    order = sorted(slots, key=lambda name: -slots[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in order:
        slot = slots[name]
        offsets[name], end = end, end + slot.bytes
        header[name] = {
            "dtype": NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = set()
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for make in groups:
            for name, tensor in make().items():
                found, planned = Slot(tensor.dtype, tuple(tensor.shape)), slots.get(name)
                if planned is None or found != Slot(planned.dtype, planned.shape):
                    raise ValueError(f"{name} is {found}, planned was {planned}")
                file.seek(8 + len(text) + offsets[name])
                file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
                written.add(name)
        if written != set(slots):
            raise ValueError(f"no tensor came for {sorted(set(slots) - written)[0]}")
        file.flush()
        os.fsync(file.fileno())


class MappedTensors:
    """The tensors of one safetensors file, by name, as views of a private memory mapping.

    Writing to such a tensor changes the process's own copy of its pages, never the file. The file
    may be renamed or deleted while tensors are in use. Raises ValueError (one line) unless the
    header describes exactly the bytes that the file has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise broken(path, "this file is missing; copy the whole folder again")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT):
                raise broken(
                    path,
                    f"its {size} bytes cannot start with a header of {length} (at most "
                    f"{HEADER_LIMIT}): it is cut short or no safetensors file; {AGAIN}",
                )
            header = parse_object(file.read(length), path, "its header")
            self.data = 8 + length
            self.slots = _slots(header, size - self.data, path)
            # A copy-on-write mapping: a tensor is writable, as any other, and the file is not.
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, the file without its header."""
        return sum(slot.bytes for slot in self.slots.values())

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name; it keeps the mapping alive."""
        slot = self.slots[name]
        count, start = math.prod(slot.shape), self.data + slot.start
        if not count:
            return torch.empty(slot.shape, dtype=slot.dtype)
        if start % slot.dtype.itemsize:  # not by our writer; kernels want aligned addresses
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=slot.bytes, offset=start)
            return raw.clone().view(slot.dtype).view(slot.shape)
        flat = torch.frombuffer(self._map, dtype=slot.dtype, count=count, offset=start)
        return flat.view(slot.shape)

    def release(self, names: Iterable[str]) -> None:
        """Give back the memory of these tensors' pages. They stay valid: read again, they come
        from the file again. Not for tensors that were written to: that would be undone."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return  # not on this system; the pages stay until memory is short
        for name in names:
            slot = self.slots[name]
            first = (self.data + slot.start) // mmap.PAGESIZE * mmap.PAGESIZE
            if slot.bytes:
                end = self.data + slot.start + slot.bytes
                self._map.madvise(mmap.MADV_DONTNEED, first, end - first)


def _slots(header: dict[str, Any], size: int, path: Path) -> dict[str, Slot]:
    """The header's tensors in the order of their bytes, checked to fill `size` bytes."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise broken(path, f"its __metadata__ is {shown(metadata)}; must map names to texts")
    slots = {name: _slot(name, entry, path) for name, entry in header.items()}
    end = 0
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if slot.start != end:
            raise broken(
                path,
                f"tensor {name} starts at byte {shown(slot.start)}; must start at {end}, where the "
                f"one before it ends; {AGAIN}",
            )
        end += slot.bytes
    if end != size:
        raise broken(
            path, f"its tensors take {end} bytes and the file holds {size} of them; {AGAIN}"
        )
    return slots


def _slot(name: str, entry: object, path: Path) -> Slot:
    if len(name) > 512 or not NAME.fullmatch(name):
        raise broken(path, f"{shown(name)} is no name of a tensor; {AGAIN}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise broken(path, f"tensor {name} is {shown(entry)}; must have dtype, shape, data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise broken(
            path, f"tensor {name} has dtype {shown(kind)}; may be {', '.join(sorted(DTYPES))}"
        )
    if not _counts(shape) or len(shape) > 8:
        raise broken(path, f"tensor {name} has shape {shown(shape)}; must be a list of sizes")
    if not _counts(offsets) or len(offsets) != 2:
        raise broken(path, f"tensor {name} has data_offsets {shown(offsets)}; must be [start, end]")
    slot = Slot(DTYPES[kind], tuple(shape), offsets[0])
    if slot.bytes != offsets[1] - offsets[0]:
        raise broken(
            path,
            f"tensor {name} of shape {shown(shape)} in {kind} takes {shown(slot.bytes)} bytes; its "
            f"data_offsets {shown(offsets)} give {shown(offsets[1] - offsets[0])}; {AGAIN}",
        )
    return slot


def _counts(value: object) -> bool:
    """Whether it is a list of integers from 0 on (and no booleans)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
