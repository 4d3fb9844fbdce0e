"""How long a stage waits for its workers and tasks to be placed, and what it says meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.capacity import Group
from cluster.resources import ResourceRequest
from cluster.session import Resources, free
from cluster.workers import is_pending
from jobs.run.context import Context

LOOK_SECONDS = 3.0


class NotPlaced(RuntimeError):
    """What a stage needs was not placed in time."""


class Placement:
    """Watches one group until it is at work, and again whenever it has lost workers."""

    def __init__(self, context: Context, stage: str, group: Group) -> None:
        self._group, self._wait = group, _Wait(context, stage)
        self._idle_since: float | None = None
        self._next_look = 0.0

    def look(self, at_work: bool) -> None:
        """Publishes what the group waits for. Raises NotPlaced after the time that it has."""
        now = time.monotonic()
        if at_work:
            self._idle_since = None
            return
        if self._idle_since is None:
            self._idle_since, self._next_look = now, now
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._wait.notify(self._why(), now - self._idle_since)

    def _why(self) -> str:
        group = self._group
        count = group.workers if group.fewest is None else group.fewest
        try:
            if not is_pending(group):
                return f"starting {group}"
            return waiting_for(count * group.cpus, count * group.gpus, *free())
        except Exception as error:  # Ray's own; a display must not end a run
            return f"waiting for {group} (Ray does not say what is free: {error})"


def tasks_wait(context: Context, stage: str) -> Callable[[ResourceRequest, float], None]:
    """What a fan-out calls while none of its tasks runs."""
    wait = _Wait(context, stage)

    def on_wait(need: ResourceRequest, seconds: float) -> None:
        there, idle = free()
        fits = idle.cpus >= need.cpus and idle.gpus >= need.gpus
        why = waiting_for(need.cpus, need.gpus, there, idle)
        wait.notify("starting tasks" if fits else why, seconds)

    return on_wait


def waiting_for(cpus: float, gpus: float, there: Resources, idle: Resources) -> str:
    """What is waited for: "waiting for 8 GPUs: cluster has 4, 2 free"."""
    if gpus:
        return f"waiting for {gpus:g} GPUs: cluster has {there.gpus:g}, {idle.gpus:g} free"
    return f"waiting for {cpus:g} CPUs: cluster has {there.cpus:g}, {idle.cpus:g} free"


class _Wait:
    """Tells why a stage waits, and ends it when that takes too long."""

    def __init__(self, context: Context, stage: str) -> None:
        self._context, self._stage = context, stage
        self._limit_s = 60.0 * context.spec.resources.placement_minutes

    def notify(self, why: str, seconds: float) -> None:
        """seconds: for how long that has been so. Raises NotPlaced after the time that it has."""
        self._context.heartbeat.update(waits=why)
        self._context.reporter.waits(self._stage, why)
        if seconds > self._limit_s:
            raise NotPlaced(
                f"{why}; not at work after resources.placement_minutes "
                f"({self._limit_s / 60:g}); free resources, or set it higher"
            )
