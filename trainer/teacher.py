"""Capture: the teacher runs over sequences, its distributions go to the logit cache.

Logits exist for one chunk of tokens at a time, on the device; writing overlaps the next forward
pass. What the cache already holds is left out, so a capture can be stopped at any moment and
continued by any number of workers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster.storage import Store
from trainer.corpus.corpus import Corpus, Part, open_corpus
from trainer.fused import chunk_tokens, head_of
from trainer.loader import next_tokens
from trainer.logits.codec import Records
from trainer.logits.store import CacheReader, write_shard
from trainer.loop import make_schedule
from trainer.models import count_parameters, find_model, load_model, meta_model, read_config
from trainer.optimizer import inference_config
from trainer.spec import CacheSpec, DataSpec, DistillSpec, TeacherSpec
from trainer.student import check_head, last_hidden
from trainer.worker import Stopped, Worker, torch_dtype

# Ids kept in records for evaluation, whatever the method for training.
EVAL_IDS = 256
# A shard is published after so many bytes of records, if not by time before.
SHARD_BYTES = 64 << 20
# Progress is told at most so often.
PROGRESS_SECONDS = 1.0
# Share of a worker's memory that an unsharded teacher's weights may take.
FITS = 0.6


@dataclass(frozen=True)
class Capture:
    """Everything a rank needs to know of a capture; picklable."""

    teacher: TeacherSpec
    cache_spec: CacheSpec
    data: DataSpec
    distill: DistillSpec | None
    seed: int
    batch_tokens: int
    shard_seconds: float
    corpus: Store
    cache: Store


class TeacherWithRecords(nn.Module):
    """forward(batch) -> the records of its positions, made chunk by chunk on the device."""

    def __init__(self, model: Any, vocab: int) -> None:
        super().__init__()
        self.model = model
        self.vocab = vocab

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        k: int,
        temperatures: Sequence[float],
    ) -> tuple[Tensor, ...]:
        """input_ids, position_ids: int64 [batch, seq]; labels: int64 [batch * seq].

        Returns on the device, with T = batch * seq: ids int64 [T, k], log-probs float32 [T, k],
        log tails float32 [T, temperatures], entropy and true log-prob float32 [T].
        """
        hidden = last_hidden(self.model, input_ids, position_ids)
        head = head_of(self.model, self.vocab)
        step = chunk_tokens(head.weight.shape[0])
        chunks = [
            self._records(head.logits(hidden[i : i + step]), labels[i : i + step], k, temperatures)
            for i in range(0, hidden.shape[0], step)
        ]
        return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))

    def _records(
        self, logits: Tensor, labels: Tensor, k: int, temperatures: Sequence[float]
    ) -> tuple[Tensor, ...]:
        log_p = torch.log_softmax(logits[:, : self.vocab], dim=-1)
        kept, ids = torch.topk(log_p, min(k, self.vocab), dim=-1)
        true = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
        # p log p is 0 where p is 0, also where log p is minus infinity.
        entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(dim=-1)
        log_p.scatter_(1, ids, float("-inf"))
        tails = [torch.logsumexp(log_p / t, dim=-1) for t in temperatures]
        return ids, kept, torch.stack(tails, dim=-1), entropy, true


def wanted(job: Capture, corpus: Corpus) -> Iterator[tuple[str, Part, list[int]]]:
    """(kind, part, sequence numbers) of all that a capture of this corpus has to hold."""
    if job.distill is not None:
        used = make_schedule(corpus, job.data, job.distill, job.seed).used()
        yield "train", corpus.part("train"), [int(i) for i in used]
    for name in ("select", "report"):
        part = corpus.part(name)
        yield "eval", part, list(range(len(part)))


def missing(job: Capture, corpus: Corpus) -> list[tuple[str, Part, list[int]]]:
    """What `wanted` names and the cache does not hold, sorted by sequence key."""
    readers = {kind: CacheReader(job.cache, kind) for kind in ("train", "eval")}
    result = []
    for kind, part, numbers in wanted(job, corpus):
        by_key = {part.keys[i].tobytes(): i for i in numbers}
        absent = readers[kind].missing(by_key)
        result.append((kind, part, [by_key[key] for key in absent]))
    return result


def capture(job: Capture, worker: Worker) -> dict[str, Any]:
    """Adds the missing sequences to the cache; returns metrics; collective.

    Raises `Stopped` after a clean stop that the user asked for.
    """
    began = time.time()
    corpus = open_corpus(job.corpus)
    asked = list(wanted(job, corpus))
    # One rank looks: all must leave with the same plan, also if another capture adds shards.
    todo = worker.share(
        [numbers for _, _, numbers in missing(job, corpus)] if worker.is_main else None
    )
    total = sum(map(len, todo))
    pids = worker.gather(os.getpid())
    already = sum(len(numbers) for _, _, numbers in asked) - total
    worker.emit("capture_start", stage="capture", missing=total, present=already, pids=pids)
    metrics: dict[str, Any] = {"sequences": total, "present": already, "tokens": 0, "bytes": 0}
    if total:
        closing = worker.patient_group()
        run = _Capture(job, worker, corpus)
        for (kind, part, _), numbers in zip(asked, todo, strict=True):
            run.add(kind, part, numbers)
        sums = worker.sum([run.tokens, run.bytes, float(run.stopped)], closing)
        metrics.update(tokens=int(sums[0]), bytes=int(sums[1]), parameters=run.parameters)
        if sums[2]:
            raise Stopped("capture stopped")
    worker.barrier()
    metrics["seconds"] = time.time() - began
    metrics["world"] = worker.world
    worker.emit("capture_done", stage="capture", metrics=metrics)
    return metrics


class _Capture:
    """One rank's teacher and its writer."""

    def __init__(self, job: Capture, worker: Worker, corpus: Corpus) -> None:
        self.job, self.worker = job, worker
        self.length = job.data.sequence_length
        self.vocab = int(corpus.manifest["vocab_size"])
        self.engine, self.parameters, self.sharded = self._engine()
        self.tokens = self.bytes = 0
        self.seen = 0
        self.stopped = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cache-writer")
        self._writing: Future[tuple[str, int]] | None = None
        self._began = time.perf_counter()
        self._told = 0.0

    def _engine(self) -> tuple[Any, int, bool]:
        import deepspeed

        teacher, worker = self.job.teacher, self.worker
        folder = find_model("teacher.model", teacher.model, teacher.revision)
        config = read_config(folder)
        if teacher.sharding == "zero3":
            refuse_sharded_experts(config)
        parameters = count_parameters(meta_model(config))
        dtype = torch_dtype(teacher.dtype)
        sharded = teacher.sharding == "zero3"
        if teacher.sharding == "auto":
            fits = parameters * dtype.itemsize <= FITS * _memory_per_worker(worker)
            sharded = worker.share(not fits)
            if sharded:
                refuse_sharded_experts(config)
        settings = inference_config(teacher.dtype, sharded)
        keep = None
        if sharded:
            from transformers.integrations import HfDeepSpeedConfig

            # A module-global weak reference: from_pretrained shards while loading if it is alive.
            keep = HfDeepSpeedConfig(settings)
        model = load_model(folder, dtype).eval()
        if not sharded:
            check_head(model, self.vocab)
        module = TeacherWithRecords(model, self.vocab)
        if not sharded:
            module.to(worker.device)
        engine, *_ = deepspeed.initialize(model=module, config=settings)
        if keep is not None:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()
        engine.eval()
        return engine, parameters, sharded

    def add(self, kind: str, part: Part, numbers: list[int]) -> None:
        """Captures this rank's share of the sequences `numbers` of `part`."""
        worker = self.worker
        mine = numbers[worker.rank :: worker.world]
        per_batch = max(1, self.job.batch_tokens // self.length)
        batches = [mine[i : i + per_batch] for i in range(0, len(mine), per_batch)]
        if self.sharded and numbers:
            # ZeRO-3 forward passes are collective: every rank makes equally many.
            rounds = -(-len(range(0, len(numbers), worker.world)) // per_batch)
            batches += [[] for _ in range(rounds - len(batches))]
        k = self.job.cache_spec.k if kind == "train" else EVAL_IDS
        self.seen = 0
        keys: list[bytes] = []
        records: list[Records] = []
        size, since = 0, time.monotonic()
        for batch in batches:
            if self._should_stop():
                break
            if batch or self.sharded:
                made = self._forward(part, batch or numbers[:1], k, kind)
                if batch:
                    keys += [part.keys[i].tobytes() for i in batch]
                    records += made
                    size += len(batch) * self.length * k * 6
            overdue = time.monotonic() - since >= self.job.shard_seconds
            if size >= SHARD_BYTES or (keys and overdue):
                self._write(kind, keys, records)
                keys, records, size, since = [], [], 0, time.monotonic()
            self._progress(kind, len(batch), len(numbers))
        if keys:
            self._write(kind, keys, records)
        self._finish_writing()

    def _forward(self, part: Part, numbers: list[int], k: int, kind: str) -> list[Records]:
        batch = part.batch(np.asarray(numbers, dtype=np.int64))
        device = self.worker.device
        with torch.inference_mode(not self.sharded), torch.no_grad():
            outputs = self.engine(
                torch.from_numpy(batch.input_ids).to(device),
                torch.from_numpy(batch.position_ids).to(device),
                torch.from_numpy(next_tokens(batch.input_ids).reshape(-1)).to(device),
                k,
                # Records for evaluation are about the distribution itself, at temperature 1.
                [1.0] if kind == "eval" else self.job.cache_spec.temperatures,
            )
        shaped = [
            value.reshape(len(numbers), self.length, *value.shape[1:]).cpu().numpy()
            for value in outputs
        ]
        ids, log_probs, tails, entropy, true = shaped
        self.tokens += len(numbers) * self.length
        return [
            Records(
                ids[i].astype(np.int32),
                log_probs[i],
                tails[i],
                entropy[i] if kind == "eval" else None,
                true[i] if kind == "eval" else None,
            )
            for i in range(len(numbers))
        ]

    def _write(self, kind: str, keys: list[bytes], records: list[Records]) -> None:
        """Hands a shard to the writer thread; waits for the one before (bounded memory)."""
        self._finish_writing()
        self.worker.hooks.fence()
        self._writing = self._writer.submit(write_shard, self.job.cache, kind, keys, records)

    def _finish_writing(self) -> None:
        if self._writing is not None:
            self.bytes += self._writing.result()[1]
            self._writing = None

    def _should_stop(self) -> bool:
        worker = self.worker
        if self.sharded:  # ranks move in step: they must stop in step
            self.stopped = worker.share(worker.is_main and worker.hooks.stop_requested())
        elif worker.hooks.stop_requested():
            self.stopped = True
        return self.stopped

    def _progress(self, kind: str, sequences: int, total: int) -> None:
        self.seen += sequences
        now = time.perf_counter()
        done = min(self.seen * self.worker.world, total)
        if done < total and now - self._told < PROGRESS_SECONDS:
            return
        self._told = now
        seconds = now - self._began
        self.worker.emit(
            "progress",
            stage="capture",
            part=kind,
            done=done,
            total=total,
            unit="sequences",
            tokens_per_s=self.tokens * self.worker.world / seconds,
        )


def refuse_sharded_experts(config: Any) -> None:
    """Raises ValueError for a mixture of experts: ranks use different experts, so they would
    wait for each other for ever while ZeRO-3 gathers them."""
    text = config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if any((getattr(text, name, None) or 0) > 1 for name in names):
        raise ValueError(
            f"teacher.sharding: zero3 does not work for {config.model_type}, a mixture of experts; "
            "use sharding: none on workers with enough memory"
        )


def _memory_per_worker(worker: Worker) -> float:
    """Bytes of memory that one worker can count on: its GPU's, or its share of the host's."""
    if worker.device.type == "cuda":
        return float(torch.cuda.get_device_properties(worker.device).total_memory)
    import psutil

    return psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", worker.world))
