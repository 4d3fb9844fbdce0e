"""Encodes and publishes records during the forward passes, in a thread, within bounded memory.

writer.reserve()          # before a forward pass: waits for room
writer.put(made)          # what it made; encoded and published by the thread

One rank fits a family's codebook on its first blocks; the others wait for it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.storage import Store
from trainer.corpus.corpus import Corpus
from trainer.logits.codebook import Codebook, family_of
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import encode
from trainer.logits.records import Coding, Draws, Records, coding_of
from trainer.logits.store import publish_codebook, read_codebook, write_shard
from trainer.teacher.job import Block, Capture, wanted
from trainer.worker import Hooks

# Sequences whose ids are counted at most.
COUNTED = 4096
# So long other ranks wait for the one that fits, and after a stop was asked for.
WAIT_SECONDS, STOP_SECONDS = 1800.0, 4.0
POLL_SECONDS = 0.5


class Codebooks:
    """The cache's codebooks by family."""

    def __init__(self, job: Capture, corpus: Corpus, vocab: int, hooks: Hooks) -> None:
        self._job, self._corpus, self._vocab, self._hooks = job, corpus, vocab, hooks
        self._known: dict[str, Codebook] = {}
        self._gave_up = False

    def get(
        self,
        family: str,
        sample: Sequence[Records | Draws] | None,
        over: Callable[[], bool] = lambda: False,
    ) -> Codebook | None:
        """The codebook of a family of kinds; None if a stop came before there was one.

        sample: the records to fit it on if the cache has none; None: another rank does that.
        over: whether an error has ended the capture, so that waiting has no use any more.
        Raises ValueError for a codebook of other settings, TimeoutError if none comes.
        """
        if family not in self._known:
            found = read_codebook(self._job.cache, family)
            if found is None:
                found = self._wait(family, over) if sample is None else self._fit(family, sample)
            if found is None:
                return None
            coding = coding_of(self._job.cache_spec, self._vocab, family)
            if found.coding != coding:
                raise ValueError(
                    f"{self._job.cache.url}: its codebook for {family} is of {found.coding}, "
                    f"asked for {coding}; remove the cache with: stillhouse cache rm "
                    f"{self._job.cache.url}"
                )
            self._known[family] = found
        return self._known[family]

    def is_there(self, family: str) -> bool:
        """Whether the cache has the family's codebook already."""
        return family in self._known or read_codebook(self._job.cache, family) is not None

    def used(self, kind: str) -> Codebook:
        """The codebook that `get` has given for a kind's family."""
        return self._known[family_of(kind)]

    def _fit(self, family: str, sample: Sequence[Records | Draws]) -> Codebook:
        spec = self._job.cache_spec
        counts = self._counts(family) if spec.remap == "frequency" else None
        made = fit_codebook(coding_of(spec, self._vocab, family), sample, counts)
        self._hooks.fence()
        return publish_codebook(self._job.cache, family, made)

    def _wait(self, family: str, over: Callable[[], bool]) -> Codebook | None:
        began, asked = time.monotonic(), 0.0
        while (found := read_codebook(self._job.cache, family)) is None:
            now = time.monotonic()
            if not asked and self._hooks.stop_requested():
                asked = now
            if over() or self._gave_up or (asked and now - asked > STOP_SECONDS):
                self._gave_up = True
                return None
            if now - began > WAIT_SECONDS:
                raise TimeoutError(
                    f"{self._job.cache.url}: no codebook for {family} after "
                    f"{WAIT_SECONDS / 60:.0f} minutes; the worker with the first sequences is "
                    "stuck or gone (see its log): run again"
                )
            time.sleep(POLL_SECONDS)
        return found

    def _counts(self, family: str) -> NDArray[np.int64]:
        """How often each id occurs in the wanted sequences, or in some of them: int64 [vocab]."""
        listed = {
            id(part): (part, np.asarray(numbers, np.int64))
            for kind, part, numbers in wanted(self._job, self._corpus)
            if family_of(kind) == family
        }
        keys = np.concatenate([part.keys[numbers] for part, numbers in listed.values()])
        order = np.argsort(keys.view("V16").ravel(), kind="stable")
        places = np.linspace(0, len(order) - 1, min(COUNTED, len(order))).astype(np.int64)
        is_counted = np.zeros(len(order), bool)
        is_counted[order[places]] = True
        counts = np.zeros(self._vocab, np.int64)
        start = 0
        for part, numbers in listed.values():
            rows = numbers[is_counted[start : start + len(numbers)]]
            start += len(numbers)
            for few in np.array_split(rows, len(rows) // 64 + 1):
                ids = part.batch(few).input_ids.ravel()
                counts += np.bincount(ids, minlength=self._vocab)[: self._vocab]
        return counts


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
        self._space = threading.Semaphore(BATCHES + ahead)
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
        while not self._space.acquire(timeout=LOOK_SECONDS):
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
                self._space.release()
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
