"""Tasks that are not with Ray yet: which may start, which wait for others, and in what order."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.room import Need


@dataclass
class Job:
    """One task of a fan-out. limit_s: seconds that it may run; the rest is its history."""

    key: str
    arguments: tuple[Any, ...]
    need: Need
    limit_s: float | None
    priority: float
    attempts: int = 0
    submitted: float | None = None


@dataclass
class Waiting:
    """Jobs by priority, of equal ones the first added first; tasks with GPUs in a lane apart.

    So that jobs that wait for a GPU do not hold up those that need none.
    """

    _lanes: dict[bool, list[tuple[float, int, Job]]] = field(default_factory=dict)
    _blocked: dict[str, tuple[Job, set[str]]] = field(default_factory=dict)
    _behind: dict[str, list[str]] = field(default_factory=dict)
    _count: int = 0

    def __len__(self) -> int:
        return len(self._blocked) + sum(len(lane) for lane in self._lanes.values())

    def add(self, job: Job, after: Iterable[str] = ()) -> None:
        """A job that may start once the keys `after` have ended."""
        missing = set(after)
        if not missing:
            self._count += 1
            lane = self._lanes.setdefault(job.need.gpus > 0, [])
            heapq.heappush(lane, (-job.priority, self._count, job))
            return
        self._blocked[job.key] = (job, missing)
        for key in missing:
            self._behind.setdefault(key, []).append(job.key)

    def ended(self, key: str, failed: bool) -> list[tuple[Job, str]]:
        """Frees what waited for `key`.

        If that failed: takes out what waited for it, and what waited for those, and returns each
        with the key that it waited for.
        """
        dropped: list[tuple[Job, str]] = []
        failures = [key] if failed else []
        for cause in failures or [key]:
            for name in self._behind.pop(cause, ()):
                if name not in self._blocked:
                    continue  # taken out because another one failed
                job, missing = self._blocked[name]
                missing.discard(cause)
                if failed:
                    del self._blocked[name]
                    dropped.append((job, cause))
                    failures.append(name)  # its turn comes in this loop
                elif not missing:
                    del self._blocked[name]
                    self.add(job)
        return dropped

    def lanes(self) -> list[bool]:
        """The lanes that hold jobs: True is that of GPUs."""
        return [gpus for gpus, lane in self._lanes.items() if lane]

    def first(self, lane: bool) -> Job | None:
        """The job of a lane whose turn it is."""
        return self._lanes[lane][0][-1] if self._lanes.get(lane) else None

    def pop(self, lane: bool) -> Job:
        """Takes it out."""
        return heapq.heappop(self._lanes[lane])[-1]
