"""Micro-batches of a training step: sequences, and the teacher's records of them.

The global batch of a step is a fixed list of sequences (`trainer.corpus.schedule`); rank r of w
takes every w-th, from r on. Ragged ends are filled with sequences of weight 0, so that all ranks
make equally many forward passes. Weights are divided by the whole batch's loss tokens, so the loss
is the mean over tokens, whatever the number of ranks and micro-batches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.storage import Store
from trainer.corpus.corpus import Corpus, Part, next_tokens
from trainer.logits.records import EVAL_IDS
from trainer.training.job import Training
from trainer.training.signals import CachedTeacher
from trainer.worker import Worker


class Order(Protocol):
    """Which sequences a step reads, and in which epoch; see `trainer.corpus.schedule.Schedule`."""

    def step_indices(self, step: int) -> NDArray[np.int64]: ...
    def step_epochs(self, step: int) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward pass on one rank.

    input_ids, position_ids: int64 [batch, seq]. token_weights: float32 [batch * seq].
    labels: int64 [batch * seq], the next token. With a teacher: ids int64 and log_probs float32
    [batch * seq, k], log_tail float32 [batch * seq]. keys: of the sequences that count, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_weights: Tensor
    labels: Tensor
    ids: Tensor | None = None
    log_probs: Tensor | None = None
    log_tail: Tensor | None = None
    keys: tuple[bytes, ...] = ()

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)[:-1]}

    def to(self, device: torch.device) -> dict[str, Tensor | None]:
        """The tensors by name, on `device`; from pinned memory the copies are not waited for."""
        return {
            name: None if value is None else value.to(device, non_blocking=True)
            for name, value in self.tensors().items()
        }

    def pinned(self, device: torch.device) -> MicroBatch:
        """The same in page-locked memory, from where copies to a GPU run beside its work."""
        with torch.cuda.device(device):  # each thread has its own; else the first GPU holds it
            pages: dict[str, Any] = {
                name: value.pin_memory()
                for name, value in self.tensors().items()
                if value is not None
            }
        return replace(self, **pages)


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank; `tokens`: loss tokens of the whole global batch."""

    number: int
    micros: list[MicroBatch]
    tokens: int
    wait_s: float = 0.0


def deal(indices: NDArray[np.int64], rank: int, world: int, multiple: int) -> NDArray[np.int64]:
    """Rank's share of `indices`; -1 fills it up so all ranks have equally many, a `multiple`."""
    per_rank = -(-len(indices) // world)
    per_rank = -(-per_rank // multiple) * multiple
    share = np.full(per_rank, -1, dtype=np.int64)
    mine = indices[rank::world]
    share[: len(mine)] = mine
    return share


def make_micro_batch(
    part: Part,
    rows: NDArray[np.int64],
    weights: NDArray[np.float32],
    teacher: CachedTeacher | None,
    epochs: NDArray[np.int64] | None = None,
) -> MicroBatch:
    """The sequences `rows` of a part, token weights = loss mask x `weights` (one per sequence).

    epochs: in which each is read (None: the first); they choose among a cache's sets of draws.
    """
    batch = part.batch(rows)
    micro = MicroBatch(
        torch.from_numpy(batch.input_ids),
        torch.from_numpy(batch.position_ids),
        torch.from_numpy((batch.loss_mask * weights[:, None]).reshape(-1)),
        torch.from_numpy(next_tokens(batch.input_ids).reshape(-1)),
        keys=tuple(key.tobytes() for key in batch.keys[weights > 0]),
    )
    if teacher is None:
        return micro
    keys = [key.tobytes() for key in batch.keys]
    read_in = np.zeros(len(rows), np.int64) if epochs is None else epochs
    records = teacher.read(keys, read_in, batch.loss_mask)
    return replace(
        micro,
        ids=torch.from_numpy(records.ids),
        log_probs=torch.from_numpy(records.log_probs),
        log_tail=torch.from_numpy(records.log_tails[:, teacher.tail]),
    )


@dataclass(frozen=True)
class StepLoader:
    """Makes the steps of one rank; pin: the GPU that they will go to."""

    part: Part
    order: Order
    teacher: CachedTeacher | None
    micro_batch: int
    rank: int
    world: int
    pin: torch.device | None = None

    def accumulation(self, sequences_per_step: int) -> int:
        """Micro-batches per step and rank."""
        return -(-sequences_per_step // (self.world * self.micro_batch))

    def step(self, number: int) -> Step:
        """Step `number`, made now."""
        indices, epochs = self.order.step_indices(number), self.order.step_epochs(number)
        tokens = int(self.part.loss_tokens[indices].sum())
        share = deal(np.arange(len(indices)), self.rank, self.world, self.micro_batch)
        real = (share >= 0).astype(np.float32)
        # Filled up with a sequence of the step: of others the cache may hold nothing.
        share = np.maximum(share, 0)
        # The engine divides by the micro-batches of a step, its reduction by the ranks.
        scale = len(share) // self.micro_batch * self.world / max(tokens, 1)
        weights = real * np.float32(scale)
        micros = [
            make_micro_batch(self.part, indices[rows], weights[at], self.teacher, epochs[rows])
            for at, rows in _batches(share, self.micro_batch)
        ]
        if self.pin is not None:
            micros = [micro.pinned(self.pin) for micro in micros]
        return Step(number, micros, tokens)

    def steps(self, start: int, stop: int, ahead: int = 2, threads: int = 1) -> Prefetched:
        """Steps from `start` to `stop`, `ahead` of them made before they are asked for."""
        return Prefetched(self.step, start, stop, ahead, threads)

    def close(self) -> None:
        """Closes the teacher's readers."""
        if self.teacher is not None:
            self.teacher.close()


class Prefetched:
    """Steps that threads make ahead of time, from the moment this exists.

    Iterating gives the steps in their order, each with the seconds that the consumer waited for
    it; what `make` raises is raised where its step is asked for. At most `ahead` steps wait or are
    being made. Close it: the threads end with their step.

    `make` runs while a model is built, which changes torch's defaults of the whole process: it may
    make tensors from arrays alone.
    """

    def __init__(
        self, make: Callable[[int], Step], start: int, stop: int, ahead: int, threads: int
    ) -> None:
        self._make = make
        self._numbers = iter(range(start, stop))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._made: deque[Future[Step]] = deque()
        for _ in range(ahead):
            self._ask()

    def _ask(self) -> None:
        number = next(self._numbers, None)
        if number is not None:
            self._made.append(self._pool.submit(self._make, number))

    def __iter__(self) -> Iterator[Step]:
        while self._made:
            began = time.perf_counter()
            step = self._made.popleft().result()
            wait_s = time.perf_counter() - began
            self._ask()
            yield replace(step, wait_s=wait_s)

    def close(self) -> None:
        """Ends the threads; steps that are not begun are not made."""
        self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class PartLoader:
    """A whole part as steps of one micro-batch for one rank, token weights = loss mask.

    Equally many on every rank; `Step.tokens` are the loss tokens of the part.
    """

    part: Part
    teacher: CachedTeacher | None
    micro_batch: int
    rank: int
    world: int
    pin: torch.device | None = None

    def __len__(self) -> int:
        return -(-len(self.part) // (self.world * self.micro_batch))

    def step(self, number: int) -> Step:
        """Micro-batch `number`, made now."""
        whole = np.arange(len(self.part), dtype=np.int64)
        share = deal(whole, self.rank, self.world, self.micro_batch)
        rows = share[number * self.micro_batch :][: self.micro_batch]
        real = (rows >= 0).astype(np.float32)
        micro = make_micro_batch(self.part, np.maximum(rows, 0), real, self.teacher)
        if self.pin is not None:
            micro = micro.pinned(self.pin)
        return Step(number, [micro], int(self.part.loss_tokens.sum()))

    def steps(self, ahead: int = 2, threads: int = 1) -> Prefetched:
        """All of them, `ahead` made before they are asked for."""
        return Prefetched(self.step, 0, len(self), ahead, threads)

    def close(self) -> None:
        """Closes the teacher's readers."""
        if self.teacher is not None:
            self.teacher.close()


def _batches(rows: NDArray[np.int64], size: int) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """(place, rows) of the micro-batches."""
    for start in range(0, len(rows), size):
        at = slice(start, start + size)
        yield at, rows[at]


# Steps are read ahead up to so many bytes, and so many steps.
AHEAD_BYTES, AHEAD_STEPS = 256 << 20, 16
# Steps that are read at once, where reading means waiting for another machine.
REMOTE_READS = 4


def make_loader(job: Training, worker: Worker, corpus: Corpus) -> StepLoader:
    """What makes this rank's steps, with the teacher's records if the losses read any."""
    spec = job.distill
    teacher = None
    if job.cache is not None and spec.mode != "online" and spec.losses.of_distributions():
        vocab, length = int(corpus.manifest["vocab_size"]), job.data.sequence_length
        teacher = CachedTeacher.for_training(
            job.cache, job.cache_spec, vocab, length, spec.temperature
        )
    return StepLoader(
        corpus.part("train"),
        job.schedule(corpus),
        teacher,
        min(int(spec.micro_batch), -(-job.sequences_per_step // worker.world)),
        worker.rank,
        worker.world,
        _pin(worker),
    )


def read_ahead(job: Training, loader: StepLoader, start: int) -> Prefetched:
    """The steps from `start` on, being read from now on."""
    cache = job.cache_spec
    width = cache.draws if cache.method == "sample" else cache.k
    sequences = loader.accumulation(job.sequences_per_step) * loader.micro_batch
    tokens = sequences * job.data.sequence_length
    fits = AHEAD_BYTES // (tokens * bytes_per_token(loader.teacher, width))
    return loader.steps(
        start,
        job.distill.steps,
        ahead=min(max(fits, 2), AHEAD_STEPS),
        threads=threads_for(job.cache),
    )


def select_loader(job: Training, worker: Worker, corpus: Corpus, micro_batch: int) -> PartLoader:
    """What reads this rank's share of `select`, with the teacher's records if there are any."""
    teacher = None
    if job.cache is not None:
        vocab, length = int(corpus.manifest["vocab_size"]), job.data.sequence_length
        teacher = CachedTeacher.for_evaluation(job.cache, job.cache_spec, vocab, length)
    part = corpus.part("select")
    return PartLoader(part, teacher, micro_batch, worker.rank, worker.world, _pin(worker))


def select_bytes(job: Training, loader: PartLoader) -> int:
    """Bytes of this rank's share of `select` in memory."""
    tokens = len(loader) * loader.micro_batch * job.data.sequence_length
    return tokens * bytes_per_token(loader.teacher, EVAL_IDS)


def bytes_per_token(teacher: CachedTeacher | None, width: int) -> int:
    """Bytes of a micro-batch per token, with records of so many ids."""
    return 28 if teacher is None else 32 + 12 * width


def threads_for(cache: Store | None) -> int:
    """Threads that read from a cache."""
    return REMOTE_READS if cache is not None and cache.local() is None else 1


def _pin(worker: Worker) -> torch.device | None:
    return worker.device if worker.device.type == "cuda" else None
