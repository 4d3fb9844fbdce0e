"""Nodes that are about to be taken away: spot instances, scale-down, maintenance."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """A node will go. seconds: from now, None where the notice does not say when."""

    node: str
    seconds: float | None

    def __str__(self) -> str:
        when = "soon" if self.seconds is None else f"in {max(0.0, self.seconds):.0f} s"
        return f"node {self.node[:8]} will be taken away {when}"


class Draining:
    """Looks for notices, at most once in `every_s` seconds; each is told once."""

    def __init__(self, every_s: float = 3.0) -> None:
        self._every_s, self._next = every_s, 0.0
        self._told: set[str] = set()

    def news(self) -> list[Notice]:
        """Notices that no earlier call returned; of the cluster this process is connected to."""
        if time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + self._every_s
        # Ray has no public name for this; its own Train asks in the same way.
        from ray._private.state import state

        found = state.get_draining_nodes()
        fresh = [node for node in sorted(found) if node not in self._told]
        self._told.update(fresh)
        now = time.time()
        return [Notice(n, found[n] / 1000 - now if found[n] else None) for n in fresh]
