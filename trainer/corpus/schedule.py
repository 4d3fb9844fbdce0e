"""Which sequences each training step reads.

One endless stream of sequence numbers, epoch after epoch; step s reads its next
`sequences_per_step`. A function of the seed and the part alone: not of ranks, workers, or of what
ran before, so a resumed run goes on exactly.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from math import floor

import numpy as np
from numpy.typing import NDArray

from trainer.corpus.corpus import Corpus
from trainer.spec.sections import DataSpec, DistillSpec

CACHED_EPOCHS = 2  # a step lies in one epoch or across two


class Schedule:
    """The order of the train part; may be asked by several threads at once.

    An epoch reads a sequence of a source of weight w floor(w) times, and of the rest w - floor(w)
    a share of the source's sequences: the next ones of a fixed shuffle, so that over the epochs
    all are read equally often.

    Args:
        sources: int16 [n], the source of each sequence.
        weights: by source, above 0.
        seed: of every shuffle.
        sequences_per_step: sequences of one optimizer step over all workers.
        steps: optimizer steps.
        max_sequences: read no more than the first so many of the stream, shuffled anew in every
            pass; None, or at least n: all.

    Raises:
        ValueError: no sequences, a source without a weight, or a number below 1.
    """

    def __init__(
        self,
        sources: NDArray[np.int16],
        weights: Sequence[float],
        seed: int,
        sequences_per_step: int,
        steps: int,
        max_sequences: int | None = None,
    ) -> None:
        if len(sources) == 0:
            raise ValueError("the train part has no sequences; add sources to data.train")
        if int(sources.min()) < 0 or int(sources.max()) >= len(weights) or min(weights) <= 0:
            raise ValueError(
                f"every source needs a weight above 0: sources 0 to {int(sources.max())}, "
                f"weights {list(weights)}"
            )
        for name, value in (
            ("sequences_per_step", sequences_per_step),
            ("steps", steps),
            ("max_sequences", 1 if max_sequences is None else max_sequences),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.sequences_per_step = sequences_per_step
        self.steps = steps
        self._seed = seed
        self._sequences = len(sources)
        self._sources = [
            (float(weights[source]), np.flatnonzero(sources == source))
            for source in np.unique(sources)
        ]
        self._epochs: dict[int, NDArray[np.int64]] = {}
        self._making = threading.Lock()
        self._pool: NDArray[np.int64] | None = None
        if max_sequences is not None and max_sequences < self._sequences:
            self._pool = np.concatenate([piece for _, piece in self._stream(0, max_sequences)])
            self._epochs.clear()

    def step_indices(self, step: int) -> NDArray[np.int64]:
        """The sequences of `step` (from 0): int64 [sequences_per_step].

        Raises:
            IndexError: there is no such step.
        """
        return np.concatenate([piece for _, piece in self._step(step)])

    def step_epochs(self, step: int) -> NDArray[np.int64]:
        """The epoch (from 0) in which `step` reads each of its sequences, in the order of
        `step_indices`: int64 [sequences_per_step].

        Raises:
            IndexError: there is no such step.
        """
        return np.concatenate([np.full(len(piece), epoch) for epoch, piece in self._step(step)])

    @property
    def epochs(self) -> int:
        """How many epochs the steps begin."""
        return int(self.step_epochs(self.steps - 1)[-1]) + 1

    def used(self) -> NDArray[np.int64]:
        """The sequences that all steps together read, sorted, each once: int64."""
        seen = np.zeros(self._sequences, dtype=np.bool_)
        reachable = self._sequences if self._pool is None else len(np.unique(self._pool))
        left, epoch = self.steps * self.sequences_per_step, 0
        while left > 0 and np.count_nonzero(seen) < reachable:
            order = self._order(epoch)[:left]
            seen[order] = True
            left, epoch = left - len(order), epoch + 1
        return np.flatnonzero(seen)

    def _step(self, step: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(epoch, sequences) of `step`."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step must be in [0, {self.steps}), got {step}")
        start = step * self.sequences_per_step
        return self._stream(start, start + self.sequences_per_step)

    def _stream(self, start: int, stop: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Numbers [start, stop) of the stream, epoch by epoch."""
        epoch = self._epoch_of(start)
        while start < stop:
            first = self._before(epoch)
            piece = self._order(epoch)[start - first : stop - first]
            yield epoch, piece
            start, epoch = start + len(piece), epoch + 1

    def _before(self, epoch: int) -> int:
        """How many numbers the epochs before `epoch` hold."""
        if self._pool is not None:
            return epoch * len(self._pool)
        return sum(
            floor(weight) * len(members) * epoch + _share(weight, len(members), epoch)
            for weight, members in self._sources
        )

    def _epoch_of(self, position: int) -> int:
        """The epoch that number `position` of the stream belongs to (epochs may be empty)."""
        high = 1
        while self._before(high) <= position:
            high *= 2
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle) <= position else (low, middle)
        return low

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The numbers of one epoch in the order they are read."""
        with self._making:
            if epoch not in self._epochs:
                while len(self._epochs) >= CACHED_EPOCHS:
                    self._epochs.pop(next(iter(self._epochs)))
                self._epochs[epoch] = self._make(epoch)
            return self._epochs[epoch]

    def _make(self, epoch: int) -> NDArray[np.int64]:
        if self._pool is not None:
            if epoch == 0:
                return self._pool
            return self._pool[shuffle(len(self._pool), self._seed, 1, epoch)]
        pieces = []
        for number, (weight, members) in enumerate(self._sources):
            pieces += [members] * floor(weight)
            first, last = (_share(weight, len(members), epoch + i) for i in (0, 1))
            if last > first:
                rotation = members[shuffle(len(members), self._seed, 2, number)]
                pieces.append(rotation[np.arange(first, last) % len(members)])
        numbers = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
        return numbers[shuffle(len(numbers), self._seed, 0, epoch)]


def shuffle(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of `count` by key: int64.

    From the raw output of Philox, which NumPy keeps the same for ever, unlike its distributions.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(raw, kind="stable")


def _share(weight: float, members: int, epochs: int) -> int:
    """How many numbers the fraction of a weight gives a source in its first `epochs` epochs."""
    return floor((weight - floor(weight)) * members * epochs)


def make_schedule(corpus: Corpus, data: DataSpec, distill: DistillSpec, seed: int) -> Schedule:
    """Which sequences each step reads: a function of corpus, spec and seed alone."""
    assert isinstance(data.max_tokens, int)
    return Schedule(
        sources=corpus.part("train").sources,
        weights=[source.weight for source in data.train],
        seed=seed,
        sequences_per_step=distill.tokens_per_step // data.sequence_length,
        steps=distill.steps,
        max_sequences=-(-data.max_tokens // data.sequence_length),
    )
