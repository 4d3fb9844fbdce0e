"""Requests to a run: a clean stop (also by Ctrl-C and SIGTERM), or a checkpoint now.

A request is an object below `state/requests/<attempt>/`; the driver and the workers of that attempt
look for it, wherever they run, with one listing.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from cluster.storage import Store

STOP, KILL, SAVE = "stop.json", "kill.json", "save-"


@dataclass(frozen=True)
class Asked:
    """What has been asked for so far. kill: to end at once; saves: how many checkpoints."""

    stop: bool = False
    kill: bool = False
    saves: int = 0


def folder(attempt: int) -> str:
    """Where the requests to an attempt are."""
    return f"state/requests/{attempt:04d}"


def ask_stop(store: Store, attempt: int, **told: Any) -> bool:
    """Asks all processes of an attempt for a clean stop; False if that was asked before."""
    return store.create(f"{folder(attempt)}/{STOP}", _body(told))


def ask_kill(store: Store, attempt: int, **told: Any) -> bool:
    """Asks the driver of an attempt to end at once; False if that was asked before."""
    return store.create(f"{folder(attempt)}/{KILL}", _body(told))


def ask_save(store: Store, attempt: int, number: int, **told: Any) -> bool:
    """Asks for the `number`-th checkpoint out of turn; False if that was asked before."""
    return store.create(f"{folder(attempt)}/{SAVE}{number:04d}.json", _body(told))


def asked(store: Store, attempt: int) -> Asked:
    """What an attempt was asked for so far."""
    names = store.list(folder(attempt))
    return Asked(STOP in names, KILL in names, sum(name.startswith(SAVE) for name in names))


def every_s(store: Store) -> float:
    """Seconds between two looks: a listing of remote storage costs more than one of a folder."""
    return 3.0 if store.local() is None else 1.0


class Requests:
    """The requests to an attempt, looked for at most once in `every` seconds.

    While the storage does not answer, what it said last holds.
    """

    def __init__(self, store: Store, attempt: int, every: float | None = None) -> None:
        self._store, self._attempt = store, attempt
        self._every = every_s(store) if every is None else every
        self._next, self._asked = 0.0, Asked()

    def stop(self) -> bool:
        """Whether a clean stop is asked for."""
        return self.look().stop

    def saves(self) -> int:
        """How many checkpoints out of turn were asked for."""
        return self.look().saves

    def look(self) -> Asked:
        """All that is asked for."""
        now = time.monotonic()
        if now >= self._next:
            try:
                self._asked = asked(self._store, self._attempt)
            except Exception as error:  # each storage has errors of its own
                print(f"requests to the run could not be read: {error}")
            self._next = time.monotonic() + self._every
        return self._asked


def _body(told: dict[str, Any]) -> bytes:
    return json.dumps({"asked_at": time.time(), **told}).encode()


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
