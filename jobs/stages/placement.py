"""Workers that are not at work yet: what they wait for, and for how long they may."""

from __future__ import annotations

import time

from cluster.session import Resources, free
from cluster.workers import Group, is_pending
from jobs.stages.base import Context

LOOK_SECONDS = 3.0
# After so long without a word from the workers the user hears what they wait for; then again.
SAY_SECONDS = 90.0


class NotPlaced(RuntimeError):
    """The workers did not start in time."""


class Placement:
    """Watches one group until it is at work, and again whenever it has lost workers."""

    def __init__(self, context: Context, stage: str, group: Group) -> None:
        self._context, self._stage, self._group = context, stage, group
        self._limit_s = 60.0 * context.spec.resources.placement_minutes
        self._idle_since: float | None = None
        self._next_look = self._next_word = 0.0

    def look(self, at_work: bool) -> None:
        """Publishes what the group waits for. Raises NotPlaced after the time that it has."""
        now = time.monotonic()
        if at_work:
            self._idle_since = None
            return
        if self._idle_since is None:
            self._idle_since, self._next_look, self._next_word = now, now, now + SAY_SECONDS
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        why = self._why()
        self._context.beacon.tell(waits=why)
        if now >= self._next_word:
            self._next_word = now + SAY_SECONDS
            self._context.reporter.say(f"{self._stage}: {why}")
        if now - self._idle_since > self._limit_s:
            raise NotPlaced(
                f"{why}; not at work after resources.placement_minutes "
                f"({self._limit_s / 60:g}); free resources, or set it higher"
            )

    def _why(self) -> str:
        group = self._group
        if not is_pending(group):
            return f"starting {group}"
        there, idle = free()
        return f"waiting for {wanted(group, there, idle)}"


def wanted(group: Group, there: Resources, idle: Resources) -> str:
    """What a group waits for: "8 GPUs: cluster has 4, 2 free"."""
    count = group.workers if group.fewest is None else group.fewest
    if group.gpus:
        return f"{count * group.gpus} GPUs: cluster has {there.gpus:g}, {idle.gpus:g} free"
    return f"{count * group.cpus} CPUs: cluster has {there.cpus:g}, {idle.cpus:g} free"
