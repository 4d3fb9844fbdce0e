"""Micro-batches of a training step: sequences, and the teacher's records of them.

The global batch of a step is a fixed list of sequences (`trainer.schedule`); rank r of w takes
every w-th, from r on. Ragged ends are filled with sequences of weight 0, so that all ranks make
equally many forward passes. Weights are divided by the whole batch's loss tokens, so the loss is
the mean over tokens, whatever the number of ranks and micro-batches.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.corpus.corpus import Part
from trainer.logits.codec import Records
from trainer.logits.store import CacheReader


class Order(Protocol):
    """Which sequences a step reads; see `trainer.schedule.Schedule`."""

    def step_indices(self, step: int) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward pass on one rank.

    input_ids, position_ids: int64 [batch, seq]. token_weights: float32 [batch * seq].
    labels: int64 [batch * seq], the next token. With a teacher: ids int64 and log_probs float32
    [batch * seq, k], log_tail float32 [batch * seq].
    """

    input_ids: Tensor
    position_ids: Tensor
    token_weights: Tensor
    labels: Tensor
    ids: Tensor | None = None
    log_probs: Tensor | None = None
    log_tail: Tensor | None = None

    def to(self, device: torch.device) -> dict[str, Tensor | None]:
        """The fields by name, on `device`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            name: None if value is None else value.to(device, non_blocking=True)
            for name, value in values.items()
        }


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank; `tokens`: loss tokens of the whole global batch."""

    number: int
    micros: list[MicroBatch]
    tokens: int
    wait_s: float = 0.0


def next_tokens(input_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels [batch, seq]: the token after each position (0 after the last, which never counts)."""
    labels = np.zeros_like(input_ids)
    labels[:, :-1] = input_ids[:, 1:]
    return labels


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
    share: NDArray[np.int64],
    scale: float,
    reader: CacheReader | None,
    tail: int,
) -> MicroBatch:
    """The sequences `share` of a part (-1: weight 0), token weights = loss mask x `scale`.

    `tail`: which of the cache's temperatures the log tail is of.
    """
    batch = part.batch(np.where(share < 0, 0, share))
    real = (share >= 0).astype(np.float32)[:, None]
    micro = MicroBatch(
        torch.from_numpy(batch.input_ids),
        torch.from_numpy(batch.position_ids),
        torch.from_numpy((batch.loss_mask * real * np.float32(scale)).reshape(-1)),
        torch.from_numpy(next_tokens(batch.input_ids).reshape(-1)),
    )
    if reader is None:
        return micro
    records: list[Records] = [reader.read(key.tobytes()) for key in batch.keys]
    return replace(
        micro,
        ids=torch.from_numpy(np.concatenate([item.ids for item in records]).astype(np.int64)),
        log_probs=torch.from_numpy(np.concatenate([item.log_probs for item in records])),
        log_tail=torch.from_numpy(np.concatenate([item.log_tails[:, tail] for item in records])),
    )


@dataclass(frozen=True)
class StepLoader:
    """Makes the steps of one rank, ahead of time, in a background thread."""

    part: Part
    order: Order
    reader: CacheReader | None
    tail: int
    micro_batch: int
    rank: int
    world: int

    def accumulation(self, sequences_per_step: int) -> int:
        """Micro-batches per step and rank."""
        return -(-sequences_per_step // (self.world * self.micro_batch))

    def step(self, number: int) -> Step:
        """Step `number`, made now."""
        indices = self.order.step_indices(number)
        tokens = int(self.part.loss_tokens[indices].sum())
        share = deal(indices, self.rank, self.world, self.micro_batch)
        # The engine divides by the micro-batches of a step, its reduction by the ranks.
        scale = len(share) // self.micro_batch * self.world / max(tokens, 1)
        micros = [
            make_micro_batch(self.part, rows, scale, self.reader, self.tail)
            for rows in share.reshape(-1, self.micro_batch)
        ]
        return Step(number, micros, tokens)

    def steps(self, start: int, stop: int, ahead: int = 2) -> Iterator[Step]:
        """Steps from `start` to `stop`, at most `ahead` of them made before they are asked for.

        Each carries the seconds that the consumer waited for it. Errors of the thread are raised
        where the step is asked for.
        """
        ready: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        over = threading.Event()

        def put(item: Any) -> None:
            while not over.is_set():
                try:
                    return ready.put(item, timeout=0.2)
                except queue.Full:
                    continue

        def make() -> None:
            try:
                for number in range(start, stop):
                    if over.is_set():
                        return
                    put(self.step(number))
            except BaseException as error:  # handed over, raised by the consumer
                put(error)

        thread = threading.Thread(target=make, name="loader", daemon=True)
        thread.start()
        try:
            for _ in range(start, stop):
                began = time.perf_counter()
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield replace(item, wait_s=time.perf_counter() - began)
        finally:
            over.set()
            thread.join(timeout=10)


def evaluation_batches(
    part: Part, reader: CacheReader | None, tail: int, micro_batch: int, rank: int, world: int
) -> Iterator[tuple[MicroBatch, Sequence[bytes]]]:
    """A whole part dealt to ranks, weights = loss mask; equally many batches on every rank."""
    share = deal(np.arange(len(part), dtype=np.int64), rank, world, micro_batch)
    for rows in share.reshape(-1, micro_batch):
        keys = [part.keys[row].tobytes() for row in rows if row >= 0]
        yield make_micro_batch(part, rows, 1.0, reader, tail), keys
