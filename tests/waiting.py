"""Waiting in tests for what another thread or process does: for events, not for spans of time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PATIENCE_S = 60.0  # so slow is no machine


def until(fact: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Returns once `fact()` is true; AssertionError if that takes longer than `seconds`."""
    ends = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < ends, f"not true after {seconds} s"
        time.sleep(0.01)


class Clock:
    """Stands in for the module `time`; it stands still except when a test puts `now` forward.

    looks: how often each thread, by its name, has read it.
    """

    def __init__(self) -> None:
        self.now = 100.0
        self.looks: dict[str, int] = {}

    def monotonic(self) -> float:
        """Seconds, of all clocks that do not care for the date."""
        name = threading.current_thread().name
        self.looks[name] = self.looks.get(name, 0) + 1
        return self.now

    perf_counter = monotonic
