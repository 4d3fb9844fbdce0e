"""What a training reads: its steps, and `select` for its evaluations."""

from __future__ import annotations

import torch

from cluster.storage import Store
from trainer.cached import CachedTeacher
from trainer.corpus.corpus import Corpus
from trainer.loader import PartLoader, Prefetched, StepLoader
from trainer.logits.coding import EVAL_IDS
from trainer.training import Training
from trainer.worker import Worker

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
