"""The tasks of a sweep that run now, and what share of all its work is done."""

from __future__ import annotations

import time
from typing import Any

from cluster.fanout import Progress

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
