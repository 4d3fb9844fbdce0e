"""The codebooks of a capture: one rank fits a family's on its first blocks, others wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.corpus.corpus import Corpus
from trainer.logits.codebook import Codebook
from trainer.logits.codebook_file import family_of
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.coding import coding_of
from trainer.logits.records import Draws, Records
from trainer.logits.store import publish_codebook, read_codebook
from trainer.teacher.job import Capture, wanted
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
