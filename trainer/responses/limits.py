"""How fast a server may be asked: requests a minute, and pauses that it demands itself; and how
many answers may fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Share of the answers that may fail for good before the run stops; one may in any case.
FAILING = 0.02


def too_many(failed: int, total: int) -> bool:
    """Whether so many answers have failed that something is wrong with more than these."""
    return failed > max(1, int(FAILING * total))


class Stop(Exception):
    """A wait ended because a stop was asked for."""


class RateLimit:
    """Spaces requests of many threads evenly, `per_minute` of them in 60 s; None = no limit.

    clock: seconds that only grow. pause(seconds): waits, and returns True if a stop was asked for.
    """

    def __init__(
        self,
        per_minute: float | None,
        pause: Callable[[float], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spacing = 0.0 if per_minute is None else 60.0 / per_minute
        self._pause, self._clock = pause, clock
        self._lock = threading.Lock()
        self._next = self._held = clock()

    def wait(self) -> None:
        """Returns when this thread may send a request. Raises Stop."""
        while True:
            with self._lock:
                at = max(self._next, self._held, self._clock())
                self._next = at + self._spacing
            if self._pause(max(0.0, at - self._clock())):
                raise Stop
            if self._held <= at:  # else a pause was demanded meanwhile, and this turn is lost
                return

    def hold(self, seconds: float) -> None:
        """Nobody sends for so long."""
        with self._lock:
            self._held = max(self._held, self._clock() + seconds)
