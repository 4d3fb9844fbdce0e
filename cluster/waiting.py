"""Tasks that are not with Ray yet: which may start, which wait for others, and in what order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Hashable, Iterable
from dataclasses import dataclass
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


class Waiting:
    """Jobs by priority, of equal ones the first added first, in lanes.

    Jobs of one lane compete for the same nodes. So those that wait for a GPU, or for the one large
    node, do not hold up the others.
    """

    def __init__(self, lane_of: Callable[[Need], Hashable]) -> None:
        """lane_of: the lane of a need, as the nodes are now."""
        self._lane_of = lane_of
        self._lanes: dict[Hashable, list[tuple[float, int, Job]]] = {}
        self._blocked: dict[str, tuple[Job, set[str]]] = {}
        self._behind: dict[str, list[str]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._blocked) + sum(len(lane) for lane in self._lanes.values())

    def add(self, job: Job, after: Iterable[str] = ()) -> None:
        """A job that may start once the keys `after` have ended."""
        missing = set(after)
        if not missing:
            self._count += 1
            self._push((-job.priority, self._count, job))
            return
        self._blocked[job.key] = (job, missing)
        for key in missing:
            self._behind.setdefault(key, []).append(job.key)

    def _push(self, entry: tuple[float, int, Job]) -> None:
        heapq.heappush(self._lanes.setdefault(self._lane_of(entry[-1].need), []), entry)

    def regroup(self) -> None:
        """Puts the jobs in their lanes anew: the nodes are others."""
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            for entry in lane:
                self._push(entry)

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

    def first(self, full: Container[Hashable] = ()) -> tuple[Hashable, Job] | None:
        """The job whose turn it is, and its lane, of lanes that are not `full`; None if none is."""
        heads = [(lane[0], key) for key, lane in self._lanes.items() if lane and key not in full]
        if not heads:
            return None
        (_, _, job), key = min(heads, key=lambda head: head[0][:2])
        return key, job

    def pop(self, lane: Hashable) -> Job:
        """Takes out the first job of a lane."""
        job = heapq.heappop(self._lanes[lane])[-1]
        if not self._lanes[lane]:
            del self._lanes[lane]
        return job
