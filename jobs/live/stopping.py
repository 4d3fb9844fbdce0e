"""A clean stop, whoever asks for it: Ctrl-C, SIGTERM, or `stillhouse stop` from anywhere."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from cluster.storage import Store
from jobs.live.requests import Requests, every_s

ENDED = 130  # exit code of a process that was told to end
SAME_SECONDS = 10.0  # within which signals to end are one


class Interruptible:
    """Ctrl-C and SIGTERM set the event `stop`; a second one ends the process at once.

    But a SIGTERM soon after the first: a cluster that takes a machine down sends it to the job and
    to all its processes, once each.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._first = 0.0  # monotonic
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruptible:
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Puts the handlers in place; signals are the main thread's alone."""
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and time.monotonic() - self._first < SAME_SECONDS:
            return
        if self._first:
            raise KeyboardInterrupt
        self._first = time.monotonic()
        self.stop.set()


class StopWatch:
    """Sets the event `stop` once an attempt is asked to stop; looks from a thread.

    Asked to end at once, it calls `last_word` and ends the process, whatever that is doing.
    """

    def __init__(
        self,
        store: Store,
        attempt: int,
        stop: threading.Event,
        last_word: Callable[[], None] = lambda: None,
    ) -> None:
        self._requests, self._stop = Requests(store, attempt, 0.0), stop
        self._last_word, self._every_s = last_word, every_s(store)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True)

    def __enter__(self) -> StopWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ending.wait(self._every_s):
            asked = self._requests.look()
            if asked.kill:
                self._last_word()
                os._exit(ENDED)
            if asked.stop:
                self._stop.set()
