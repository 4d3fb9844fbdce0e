"""Encoding and publishing beside the forward passes, in a thread, within bounded memory.

writer.reserve()          # before a forward pass: waits for room
writer.put(made)          # what it made; encoded and published by the thread
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.storage import Store
from trainer.logits.codebook import Codebook
from trainer.logits.codebook_file import family_of
from trainer.logits.codec import encode
from trainer.logits.records import Coding, Draws, Records
from trainer.logits.store import write_shard
from trainer.teacher.blocks import Block
from trainer.teacher.codebooks import Codebooks

# Encoded records are published after so many bytes, if not by time before.
SHARD_BYTES = 64 << 20
# Batches on the host, made or in the making.
BATCHES = 2
# How often a waiting thread looks whether the other one is still there.
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Made:
    """What a forward pass made of a block: results of `TeacherWithRecords`, on the host.

    keys: of the block's sequences; the results may be of more. captured: bool [sequences, seq],
    the positions that the results are of, in their order.
    kinds: which of the work's kinds the sets of draws are of, by index (one index without draws).
    ready: waits until the results have arrived from the device.
    """

    block: Block
    keys: list[bytes]
    captured: NDArray[np.bool_]
    coding: Coding
    kinds: list[int]
    results: tuple[Tensor, ...]
    ready: Callable[[], None]

    def records(self) -> list[list[Records | Draws]]:
        """The records of every kind in `kinds`, of every sequence.

        Raises ValueError, naming the sequence, for logits that are NaN or infinite.
        """
        self.ready()
        captured = self.captured[: len(self.keys)]
        ends = np.cumsum(captured.sum(axis=1))
        rows = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        usable, *arrays = (value.numpy()[: ends[-1]] for value in self.results)
        if not usable.all():
            bad, position = np.argwhere(captured)[np.argmin(usable)]
            raise ValueError(
                f"teacher.model: NaN or infinite logits at position {position} of sequence "
                f"{self.keys[bad].hex()} ({self.block.work.part}); check the model's weights, or "
                "try teacher.dtype=float32"
            )
        if self.coding.method == "sample":
            [draws] = arrays
            return [[Draws(draws[one, j]) for one in rows] for j in range(draws.shape[1])]
        ids, *others = arrays
        ids = ids.astype(np.int64)
        return [[Records(ids[one], *(values[one] for values in others)) for one in rows]]


@dataclass
class _Shard:
    """Encoded records that wait to be published, by sequence key, and the time of the first.

    positions: of each record. size: bytes of all.
    """

    blobs: dict[bytes, bytes]
    since: float
    positions: dict[bytes, int] = field(default_factory=dict)
    size: int = 0


class Writer:
    """The thread that encodes and publishes; one per rank.

    bytes, positions: published, by family of kinds; every set of draws counts.
    wait_s: seconds that the forward passes waited for it. gave_up: whether records were lost,
    because a stop or an error came before there was a codebook.
    """

    def __init__(
        self,
        cache: Store,
        codebooks: Codebooks,
        fence: Callable[[], None],
        shard_seconds: float,
        ahead: int = 0,
    ) -> None:
        """ahead: batches that are in the making on the device, beside those on the host."""
        self.bytes: Counter[str] = Counter()
        self.positions: Counter[str] = Counter()
        self.wait_s, self.gave_up = 0.0, False
        self._cache, self._codebooks, self._fence = cache, codebooks, fence
        self._seconds = shard_seconds
        self._room = threading.Semaphore(BATCHES + ahead)
        self._made: queue.Queue[Made | None] = queue.Queue()
        self._open: dict[str, _Shard] = {}
        self._held: list[tuple[Made, list[list[Records | Draws]]]] = []  # until there is a codebook
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Publishes what is left, unless an error ends the capture; raises the thread's error."""
        if kind is not None:
            self._over.set()
        self._made.put(None)
        began = time.perf_counter()
        while self._thread.is_alive():
            self._thread.join(LOOK_SECONDS)
        self.wait_s += time.perf_counter() - began
        if kind is None:
            self._check()

    def reserve(self) -> None:
        """Waits for room for one more batch. Raises the thread's error."""
        began = time.perf_counter()
        while not self._room.acquire(timeout=LOOK_SECONDS):
            self._check()
        self.wait_s += time.perf_counter() - began
        self._check()

    def put(self, made: Made) -> None:
        """Hands over a batch that room was reserved for."""
        self._made.put(made)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                made = self._next()
                if made is None:
                    break
                self._encode(made)
                del made  # before there is room for another one
                self._room.release()
            self.gave_up = self.gave_up or bool(self._held)  # stopped before there was a codebook
            if not self._over.is_set():
                self._publish(list(self._open))
        except BaseException as error:  # raised by the thread of the forward passes
            self._error = error

    def _next(self) -> Made | None:
        """The next batch; None at the end. Publishes what is due meanwhile."""
        while True:
            now = time.monotonic()
            due = [kind for kind, shard in self._open.items() if now - shard.since >= self._seconds]
            self._publish(due)
            left = min((shard.since for shard in self._open.values()), default=now + 1e6)
            try:
                return self._made.get(timeout=max(0.0, left + self._seconds - now))
            except queue.Empty:
                continue

    def _encode(self, made: Made) -> None:
        family, records = made.block.work.family, made.records()
        self._held.append((made, records))
        sample = None
        if made.block.sample and not self._codebooks.is_there(family):
            if not made.block.fits:
                return
            sample = [record for _, held in self._held for record in held[0]]
        held, self._held = self._held, []
        book = self._codebooks.get(family, sample, self._over.is_set)
        if book is None:
            self.gave_up = True
            return
        for one, its_records in held:
            self._add(one, its_records, book)
        if sum(shard.size for shard in self._open.values()) >= SHARD_BYTES:
            self._publish(list(self._open))

    def _add(self, made: Made, records: list[list[Records | Draws]], book: Codebook) -> None:
        """Encodes the records that the cache lacks."""
        block = made.block
        for index, items in zip(made.kinds, records, strict=True):
            kind = block.work.kinds[index]
            for key, item, lacks in zip(made.keys, items, block.lacks[:, index], strict=True):
                if lacks:
                    blob = encode(item, book)
                    shard = self._open.setdefault(kind, _Shard({}, time.monotonic()))
                    shard.blobs[key] = blob  # the same sequence may be in two parts
                    shard.positions[key] = len(item.ids)
                    shard.size += len(blob)

    def _publish(self, kinds: list[str]) -> None:
        for kind in kinds:
            shard = self._open.pop(kind)
            keys, blobs = list(shard.blobs), list(shard.blobs.values())
            self._fence()
            book = self._codebooks.used(kind)
            self.bytes[family_of(kind)] += write_shard(self._cache, kind, keys, blobs, book)[1]
            self.positions[family_of(kind)] += sum(shard.positions.values())
