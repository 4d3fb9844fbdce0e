"""What a capture is asked to do, and what of it the cache lacks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cluster.storage import Store
from trainer.auto import auto_batch_tokens
from trainer.corpus.corpus import Corpus, Part
from trainer.logits.coding import train_kinds
from trainer.logits.reader import CacheReader
from trainer.schedule import make_schedule
from trainer.spec import CacheSpec, DataSpec, DistillSpec, TeacherSpec

# A codebook is fitted on the records of at least so many tokens, where there are so many.
SAMPLE_TOKENS = 4096


@dataclass(frozen=True)
class Capture:
    """Everything a rank needs to know of a capture; picklable."""

    teacher: TeacherSpec
    cache_spec: CacheSpec
    data: DataSpec
    distill: DistillSpec | None
    seed: int
    batch_tokens: int | Literal["auto"]
    shard_seconds: float
    corpus: Store
    cache: Store


def wanted(job: Capture, corpus: Corpus) -> Iterator[tuple[str, Part, list[int]]]:
    """(kind, part, sequence numbers) of all that a capture of this corpus has to hold.

    Every set of draws is a kind of its own; sets that no epoch will read are left out.
    """
    if job.distill is not None:
        part = corpus.part("train")
        schedule = make_schedule(corpus, job.data, job.distill, job.seed)
        used = schedule.used().tolist()
        for kind in train_kinds(job.cache_spec)[: schedule.epochs]:
            yield kind, part, used
    for name in ("select", "report"):
        part = corpus.part(name)
        yield "eval", part, list(range(len(part)))


def missing(job: Capture, corpus: Corpus) -> list[tuple[str, Part, list[int]]]:
    """What `wanted` names and the cache does not hold, sorted by sequence key."""
    readers: dict[str, CacheReader] = {}
    result = []
    for kind, part, numbers in wanted(job, corpus):
        if kind not in readers:  # an empty reader is false, and opened once all the same
            readers[kind] = CacheReader(job.cache, kind)
        by_key = {part.keys[i].tobytes(): i for i in numbers}
        result.append((kind, part, [by_key[key] for key in readers[kind].missing(by_key)]))
    for reader in readers.values():
        reader.close()
    return result


def batch_size(job: Capture, parameters: int, device: str) -> int:
    """Sequences of one forward pass, by a teacher of so many parameters on "cpu" or "cuda"."""
    tokens = job.batch_tokens
    if tokens == "auto":
        tokens = auto_batch_tokens(parameters, device)
    return max(1, tokens // job.data.sequence_length)


def sample_blocks(job: Capture, size: int) -> int:
    """Blocks of `size` sequences whose records a family's codebook is fitted on.

    One is large enough, unless `auto` has made blocks small for a CPU's sake.
    """
    if job.batch_tokens != "auto":
        return 1
    return max(1, math.ceil(SAMPLE_TOKENS / (size * job.data.sequence_length)))


def count_wanted(job: Capture, corpus: Corpus) -> int:
    """Sequences that `wanted` names, each once, however many kinds of records it has."""
    return sum({id(part): len(numbers) for _, part, numbers in wanted(job, corpus)}.values())
