"""Progress of a sweep: the tasks that run now, the share of each, and of all its work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from cluster.fanout import Progress
from cluster.kv import Report

# Tasks that are named at a time.
NAMED = 4
# Seconds between two words about tasks that go on; later in a long sweep a little more, as every
# word stays in the run's events.
WORD_S, LONGEST_WORD_S = 2.0, 5.0


class Running:
    """What the tasks of a sweep have said of themselves. Work is in units of the caller's."""

    def __init__(self) -> None:
        self._work: dict[str, float] = {}
        self._ended: set[str] = set()
        self._now: dict[str, Progress] = {}
        self._began = time.monotonic()
        self._said = 0.0

    def added(self, key: str, work: float) -> None:
        """A task that is to run."""
        self._work[key] = work

    def heard(self, key: str, progress: Progress) -> None:
        """A task runs, and is that far."""
        self._now[key] = progress

    def lost(self, key: str) -> None:
        """A task does not run any more and is to run again."""
        self._now.pop(key, None)

    def ended(self, key: str) -> None:
        """A task has ended, however."""
        self._now.pop(key, None)
        self._ended.add(key)

    def share(self) -> float:
        """The share of all work that is done."""
        done = sum(self._work[key] for key in self._ended)
        done += sum(self._work[key] * progress.done for key, progress in self._now.items())
        return done / total if (total := sum(self._work.values())) else 0.0

    def tasks(self) -> list[dict[str, Any]]:
        """The first of those that run, for the run's events."""
        return [
            {"key": _name(key), "share": round(progress.done, 4), "words": progress.words}
            for key, progress in list(self._now.items())[:NAMED]
        ]

    def due(self) -> bool:
        """Whether it is time for another word about tasks that go on."""
        now = time.monotonic()
        wait = min(LONGEST_WORD_S, max(WORD_S, (now - self._began) / 1000))
        if now - self._said < wait:
            return False
        self._said = now
        return True


def _name(key: str) -> str:
    """A task as the user knows it: a cell by its key, a 16-bit model by its role."""
    kind, _, name = key.partition("/")
    if kind == "model":
        return f"{name.removesuffix('-records')} in 16 bits"
    return f"allocation {name}" if kind == "allocate" else name


# Work is counted in sequences that a model of the sweep passes once. What takes as long as
# quantizing, in tokens: both grow with the model (hqq on a CPU, one thread).
QUANTIZE_TOKENS = 4_000
EVALUATE = 1.2  # with its head and the reference's, and all divergences
TASK_TOKENS = 300  # of a document of a benchmark task, with all of its answers
TASK_DOCUMENTS = 1_000  # of a task without a limit
HEAD = 0.25  # the same without the forward pass, from stored hidden states
LEARN = 4.0  # a forward and a backward pass, beside a second model or records

_WORDS = {"reference": "hidden states of", "evaluation": "evaluated on"}


class Advance:
    """Tells `report` how far a task of several phases is."""

    def __init__(self, report: Report, work: Mapping[str, float]) -> None:
        """work: of each phase; no more than a guess."""
        self._report, self._work = report, dict(work)
        self._total = sum(work.values()) or 1.0
        self._shares = dict.fromkeys(work, 0.0)
        report(0.0, "loading the model")

    def at(self, phase: str, share: float, words: str) -> None:
        """That share of a phase is done."""
        if phase in self._work:
            self._shares[phase] = share
            done = sum(self._work[each] * self._shares[each] for each in self._work)
            self._report(done / self._total, words)

    def part(self, name: str, sequences: int) -> Callable[[str, float], None]:
        """What an evaluation calls; phases are e.g. "evaluation/report"."""

        def notify(what: str, done: float) -> None:
            words = f"{_WORDS[what]} {name}: {int(done)} of {sequences} sequences"
            self.at(f"{what}/{name}", done / max(1, sequences), words)

        return notify

    def quantized(self, done: int, total: int) -> None:
        """What `quant.evaluation.cell.run_cell` calls."""
        self.at("quantize", done / total, f"quantizing: {100 * done / total:.0f} %")

    def answered(self, share: float, task: str, done: int, total: int) -> None:
        """What `quant.evaluation.lm_eval.run_tasks` calls."""
        self.at("tasks", share, f"benchmark task {task}: {done} of {total} answers")

    def steps(self, done: int, total: int) -> None:
        """What a recovery calls."""
        self.at("recover", done / total, f"recovering: step {done} of {total}")
