"""What a capture is asked to do, and what of it the cache lacks.

Sequences that lack records are cut into blocks, one per forward pass. What a forward pass makes of
a sequence depends, in the last bits, on its shape, on its mask (there is none if every sequence is
one document), on some hardware on the place in the batch, and with a mixture of experts on the rest
of the batch. So all blocks have equally many sequences, of one kind, in the order of the keys. And
as captures store whole blocks, what a capture leaves behind, however it ended and with however many
workers, are the same blocks for the next one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cluster.storage import Store
from trainer.corpus.corpus import Corpus, Part
from trainer.corpus.schedule import make_schedule
from trainer.logits.codebook import family_of
from trainer.logits.reader import CacheReader
from trainer.logits.records import train_kinds
from trainer.resolve_auto import auto_batch_tokens
from trainer.spec.sections import CacheSpec, DataSpec, DistillSpec, TeacherSpec

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


PARTS = ("select", "report", "train")


@dataclass(frozen=True)
class Work:
    """Sequences of one part, all of one document or all of several, that lack records.

    kinds: of records that some lack. numbers: int64 [n], by sequence key. lacks: bool [n, kinds].
    """

    part: str
    kinds: tuple[str, ...]
    numbers: NDArray[np.int64]
    lacks: NDArray[np.bool_]

    @property
    def family(self) -> str:
        """The kinds' common family: train or eval."""
        return family_of(self.kinds[0])


@dataclass(frozen=True)
class Block:
    """The sequences of one forward pass: a slice of a `Work`.

    sample: the codebook of the family is fitted on its records, and those of the others that have
    this. fits: it is the last of them.
    """

    work: Work
    numbers: NDArray[np.int64]
    lacks: NDArray[np.bool_]
    sample: bool = False
    fits: bool = False

    def filled(self, size: int) -> NDArray[np.int64]:
        """Sequence numbers for a forward pass of `size` sequences; repeats fill it up."""
        return np.resize(self.numbers, size)


def pending_work(job: Capture, corpus: Corpus) -> list[Work]:
    """What has to be done; the parts for evaluation come first: they are small, and workers wait
    for each other's codebooks before they are far apart."""
    found = [(kind, part, numbers) for kind, part, numbers in missing(job, corpus) if numbers]
    result = []
    for name in PARTS:
        part = corpus.part(name)
        lists = [(kind, numbers) for kind, of, numbers in found if of is part]
        if not lists:
            continue
        numbers = np.unique(np.concatenate([some for _, some in lists]))
        numbers = numbers[np.argsort(part.keys[numbers].view("V16").ravel())]
        lacks = np.stack([np.isin(numbers, some) for _, some in lists], axis=1)
        mixed = part.mixed(numbers)
        kinds = tuple(kind for kind, _ in lists)
        works = [Work(name, kinds, numbers[rows], lacks[rows]) for rows in (mixed, ~mixed)]
        # The larger one first: codebooks are fitted on a family's first blocks.
        works.sort(key=lambda work: -len(work.numbers))
        result += [work for work in works if len(work.numbers)]
    return result


def blocks(works: Sequence[Work], size: int, sample: int = 1) -> Iterator[Block]:
    """All blocks of at most `size` sequences, in order; of each family the first `sample` are the
    codebook's sample."""
    spans = [
        (work, slice(start, start + size))
        for work in works
        for start in range(0, len(work.numbers), size)
    ]
    left = {
        family: min(sample, count)
        for family, count in Counter(work.family for work, _ in spans).items()
    }
    for work, span in spans:
        more = left[work.family]
        left[work.family] = max(0, more - 1)
        yield Block(work, work.numbers[span], work.lacks[span], more > 0, more == 1)


def deal(every: Sequence[Block], world: int) -> list[list[Block]]:
    """The blocks of each rank, in order. Those of a codebook's sample go to one rank; of the others
    each goes to the rank that has fewest, the lowest first."""
    hands: list[list[Block]] = [[] for _ in range(world)]
    owners: dict[str, int] = {}
    for block in every:
        rank = min(range(world), key=lambda rank: len(hands[rank]))
        if block.sample:
            rank = owners.setdefault(block.work.family, rank)
        hands[rank].append(block)
    return hands
