"""One rank's capture: forward passes over its blocks, one writer."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.corpus.corpus import Batch, Corpus, next_tokens, open_corpus
from trainer.logits.records import coding_of, train_kinds
from trainer.models.load import layer_progress
from trainer.teacher.forward import TeacherWithRecords
from trainer.teacher.job import (
    Block,
    Capture,
    Work,
    batch_size,
    blocks,
    count_wanted,
    deal,
    pending_work,
    sample_blocks,
)
from trainer.teacher.sampling import stream
from trainer.teacher.teacher import Teacher, load_teacher
from trainer.teacher.writer import Codebooks, Made, Writer
from trainer.worker import PeakMemory, Stopped, Worker

# Progress is told at most so often.
PROGRESS_SECONDS = 1.0


def capture(job: Capture, worker: Worker) -> dict[str, Any]:
    """Adds the missing records to the cache; returns metrics; collective.

    Of the metrics forward_s and wait_s (forward passes, and waiting for the writer) are means over
    the ranks; bytes_per_token is by family of kinds, of the positions that have records, and of one
    set of draws where there are more; peak_bytes is the memory of the rank that held most.
    Raises `Stopped` after a clean stop that the user asked for, ValueError for logits that are not
    numbers.
    """
    began, peak = time.time(), PeakMemory(worker.device)
    corpus = open_corpus(job.corpus)
    # One rank looks: all must leave with the same plan, also if another capture adds shards.
    works, asked = worker.share(
        (pending_work(job, corpus), count_wanted(job, corpus)) if worker.is_main else None
    )
    total = sum(len(work.numbers) for work in works)
    present = asked - total
    pids = worker.gather(os.getpid())
    worker.emit("capture_start", stage="capture", missing=total, present=present, pids=pids)
    metrics: dict[str, Any] = {"sequences": total, "present": present, "tokens": 0, "bytes": 0}
    if works:
        closing = worker.patient_group()
        vocab = int(corpus.manifest["vocab_size"])
        teacher = load_teacher(job.teacher, vocab, worker, partial(TeacherWithRecords, vocab=vocab))
        run = CaptureRun(job, worker, corpus, works, teacher)
        try:
            run.all_blocks()
        finally:
            teacher.close()
        families = sorted({work.family for work in works})
        tokens, forward_s, wait_s, stopped, *published = worker.sum(
            [run.tokens, run.forward_s, run.wait_s, float(run.stopped)]
            + [count[family] for count in (run.bytes, run.positions) for family in families],
            closing,
        )
        sizes, positions = published[: len(families)], published[len(families) :]
        metrics.update(
            tokens=int(tokens),
            bytes=int(sum(sizes)),
            bytes_per_token={
                family: size / count
                for family, size, count in zip(families, sizes, positions, strict=True)
                if count
            },
            forward_s=forward_s / worker.world,
            wait_s=wait_s / worker.world,
            parameters=teacher.parameters,
        )
        if stopped:
            raise Stopped("capture stopped")
        metrics["peak_bytes"] = peak.largest(worker)
    worker.barrier()
    metrics["seconds"] = time.time() - began
    metrics["world"] = worker.world
    worker.emit("capture_done", stage="capture", metrics=metrics)
    return metrics


class CaptureRun:
    """One rank's forward passes over its blocks, and its writer.

    tokens: of the sequences captured by it. bytes, positions: published, by family of kinds.
    forward_s, wait_s: seconds of forward passes, and of waiting for the writer. stopped: whether a
    stop was asked for before the end.
    """

    def __init__(
        self, job: Capture, worker: Worker, corpus: Corpus, works: list[Work], teacher: Teacher
    ) -> None:
        self.job, self.worker, self.corpus, self.works = job, worker, corpus, works
        self.teacher = teacher
        self.length = job.data.sequence_length
        self.size = batch_size(job, teacher.parameters, worker.device.type)
        self.vocab = int(corpus.manifest["vocab_size"])
        self.tokens = 0
        self.bytes: Counter[str] = Counter()
        self.positions: Counter[str] = Counter()
        self.forward_s = self.wait_s = 0.0
        self.stopped = False
        self._totals = _sequences((work.family, work.numbers) for work in works)
        self._mine: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        self._began = time.perf_counter()
        self._told = -PROGRESS_SECONDS

    def all_blocks(self) -> None:
        """Captures this rank's share of all blocks, or until a stop is asked for."""
        job, worker, group = self.job, self.worker, self.teacher.group
        every = list(blocks(self.works, self.size, sample_blocks(job, self.size)))
        mine = deal(every, worker.world)[worker.rank]
        self._mine = _sequences((block.work.family, block.numbers) for block in mine)
        # Ranks that share one copy of the weights make equally many forward passes.
        rounds = max(group.gather(len(mine)))
        codebooks = Codebooks(job, self.corpus, self.vocab, worker.hooks)
        ahead = int(worker.device.type != "cpu")
        running: deque[Callable[[], None]] = deque()
        if mine:
            self._notify(mine[0].work.family)
        with Writer(job.cache, codebooks, worker.hooks.fence, job.shard_seconds, ahead) as writer:
            for turn in range(rounds):
                if self._should_stop():
                    break
                block = mine[turn] if turn < len(mine) else None
                if block is not None:
                    writer.reserve()
                began = time.perf_counter()
                with layer_progress(self._layers(), partial(self._within, block)):
                    made = self._forward(block or every[0])
                running.append(made.ready)
                if len(running) > ahead:  # the device works on the last one meanwhile
                    running.popleft()()
                self.forward_s += time.perf_counter() - began
                if block is not None:
                    writer.put(made)
                    self._progress(block)
                del made  # its memory is the writer's
        self.bytes, self.positions, self.wait_s = writer.bytes, writer.positions, writer.wait_s
        self.stopped = self.stopped or writer.gave_up

    def _forward(self, block: Block) -> Made:
        work = block.work
        part = self.corpus.part(work.part)
        batch = part.batch(block.filled(self.size))
        device = self.worker.device
        coding = coding_of(self.job.cache_spec, self.vocab, work.family)
        captured = np.ones(batch.loss_mask.shape, bool)
        places = None
        if self.job.cache_spec.positions == "loss":
            captured = batch.loss_mask != 0
            places = torch.from_numpy(np.flatnonzero(captured)).to(device)
        kinds, streams = [0], None
        if coding.method == "sample":
            kinds = np.flatnonzero(block.lacks.any(axis=0)).tolist()
            streams = self._streams(batch, [work.kinds[index] for index in kinds]).to(device)
        with torch.inference_mode(not self.teacher.sharded), torch.no_grad():
            results = self.teacher.engine(
                torch.from_numpy(batch.input_ids).to(device),
                torch.from_numpy(batch.position_ids).to(device),
                torch.from_numpy(next_tokens(batch.input_ids)).to(device),
                coding,
                streams,
                places,
            )
        keys = [key.tobytes() for key in batch.keys[: len(block.numbers)]]
        on_host, ready = to_host(results)
        return Made(block, keys, captured, coding, kinds, on_host, ready)

    def _streams(self, batch: Batch, kinds: list[str]) -> Tensor:
        """int64 [batch, kinds, 4]: see `sampling.stream`."""
        spec = self.job.cache_spec
        redraws = [train_kinds(spec).index(kind) for kind in kinds]
        return torch.tensor(
            [
                [stream(spec.seed, key.tobytes(), redraw) for redraw in redraws]
                for key in batch.keys
            ],
            dtype=torch.int64,
        )

    def _should_stop(self) -> bool:
        self.stopped = self.teacher.group.stop_agreed()
        return self.stopped

    def _progress(self, block: Block) -> None:
        family, count = block.work.family, len(block.numbers)
        self.tokens += count * self.length
        self._seen[family] += count
        self._notify(family)

    def _layers(self) -> nn.Module:
        """What tells of its layers; a sharded teacher, whose ranks run in step, does not."""
        return nn.Module() if self.teacher.sharded else self.teacher.engine

    def _within(self, block: Block | None, share: float) -> None:
        """Of a block under way that share is done."""
        if block is not None and share < 1:
            self._notify(block.work.family, share * len(block.numbers))

    def _notify(self, family: str, more: float = 0.0) -> None:
        """Tells the progress now and then. more: sequences of a block that is under way."""
        now = time.perf_counter()
        total = self._totals[family]
        # If the others are as far.
        done = int(total * (self._seen[family] + more) / self._mine[family])
        if done < total and now - self._told < PROGRESS_SECONDS:
            return
        self._told = now
        tokens = self.tokens + more * self.length
        self.worker.emit(
            "progress",
            stage="capture",
            part=family,
            done=done,
            total=total,
            unit="sequences",
            tokens_per_s=tokens * self.worker.world / max(now - self._began, 1e-9),
        )


def _sequences(lists: Iterable[tuple[str, NDArray[np.int64]]]) -> Counter[str]:
    """How many sequences of each family there are."""
    totals: Counter[str] = Counter()
    for family, numbers in lists:
        totals[family] += len(numbers)
    return totals


def to_host(results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """The tensors on the host, and what waits until they have arrived there."""
    if results[0].device.type == "cpu":
        return results, lambda: None
    copies = []
    for value in results:
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        copies.append(copy.copy_(value, non_blocking=True))
    event = torch.cuda.Event()
    event.record()
    return tuple(copies), event.synchronize
