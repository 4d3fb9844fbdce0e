"""The driver's heartbeat: what it publishes of its run while it works, and a reader's view of it.

`state/live/<attempt>.json` is replaced whenever something changes, and at least every
`SIGN_SECONDS`: a driver that gave no sign for `LOST_SECONDS` is lost. It holds estimates of the
time left, and the Ray job that the driver belongs to.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from cluster.storage import Store

# Sooner than that a guess is worth nothing.
LEAST_S = 5.0


class Remaining:
    """Estimates for several things at once, each by its name."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, float]] = {}
        self._last: dict[str, float] = {}

    def seconds(self, name: str, share: float, now: float) -> float | None:
        """Seconds left of `name`, of which that share is done at the time `now`; None if unknown.

        A share that falls is a new beginning.
        """
        if share < self._last.get(name, 2.0):
            self._first[name] = (now, share)
        self._last[name] = share
        began, before = self._first[name]
        if share >= 1 or share <= before or now - began < LEAST_S:
            return None
        return (now - began) * (1 - share) / (share - before)


def in_words(seconds: float) -> str:
    """ "about 40 s left", "about 12 min left", "about 3.5 h left"."""
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} s left"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"


SIGN_SECONDS = 15.0
LOST_SECONDS = 75.0
CHANGE_SECONDS = 2.0  # between two publications at least
LAST_TRIES = 10

# Events by which the workers of a stage show that they are at work.
AT_WORK = {
    "at_work",
    "step",
    "progress",
    "capture_start",
    "evaluation",
    "checkpoint",
    "training_start",
    "resume",
    "cell_start",
}


def live_path(attempt: int) -> str:
    """Where the driver of an attempt says how it is."""
    return f"state/live/{attempt:04d}.json"


class Heartbeat:
    """Follows the events of a run and publishes what it is doing, and why it waits.

    told: kept in every publication, such as the id of the Ray job. What it cannot publish is lost,
    and the run goes on.
    """

    def __init__(self, store: Store, attempt: int, **told: Any) -> None:
        self._store, self._attempt = store, attempt
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {
            "attempt": attempt,
            "status": "running",
            "began": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "stage": None,
            "waits": None,
            "restarts": 0,
            "restarting": None,
            "progress": {},
            "failed_cells": 0,
            **told,
        }
        self._remaining = Remaining()
        self._changed = True
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beacon", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        for _again in range(
            LAST_TRIES
        ):  # without its last word a run that is done would count as lost
            if self._publish():
                return
            time.sleep(CHANGE_SECONDS)

    def cut_off(self) -> None:
        """Publishes that the process ends now, by force."""
        self.end("stopped", "ended by force; what is newer than the last checkpoint is lost")
        self._publish()

    def update(self, **fields: Any) -> None:
        """Changes what is published; None takes a field back."""
        with self._lock:
            before = dict(self._state)
            self._state.update(fields)
            self._changed = self._changed or before != self._state

    def end(self, status: str, error: str | None = None) -> None:
        """The last word: done, failed or stopped; published when the block is left."""
        self.update(status=status, error=error, ended=time.time(), waits=None, restarting=None)

    def event(self, event: Mapping[str, Any]) -> None:
        """Takes over what an event says of the state of the run."""
        kind, stage = event["event"], event.get("stage")
        if kind == "stage_start":
            self.update(stage=stage, waits=None, restarts=0, progress={}, failed_cells=0)
        elif kind == "group_lost":
            self._lost(event)
        elif kind == "cell_done" and event["status"] != "done":
            with self._lock:
                failed = self._state["failed_cells"] + 1
            self.update(failed_cells=failed)
        elif kind == "step":
            self._progress(stage, event["step"], event["steps"], unit="steps")
        elif kind == "progress":
            others = {name: event[name] for name in ("unit", "share", "tasks") if name in event}
            self._progress(stage, event["done"], event["total"], **others)
            if "failed" in event:
                self.update(failed_cells=event["failed"])
        if kind in AT_WORK:
            self.update(waits=None, restarting=None)

    def _progress(self, stage: str | None, done: float, total: int, **others: Any) -> None:
        share = others.get("share", min(1.0, done / total) if total else 1.0)
        left = self._remaining.seconds(f"{stage} {others['unit']}", share, time.monotonic())
        told = {"stage": stage, "done": int(min(done, total)), "total": total, "left_s": left}
        self.update(progress={**told, **others})

    def _lost(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            restarts = self._state["restarts"] + 1
        most = event.get("max_failures", 0) + 1
        told = f"restarting after {event['what']}, attempt {restarts + 1} of {most}"
        if restarts + 1 > most:
            told = f"{event['what']}, the last of {most} attempts"
        self.update(restarts=restarts, restarting=told)

    def _run(self) -> None:
        published = 0.0
        while not self._ending.wait(CHANGE_SECONDS if published else 0.0):
            if self._changed or time.monotonic() - published >= SIGN_SECONDS:
                self._publish()
                published = time.monotonic()

    def _publish(self) -> bool:
        with self._lock:
            self._state["t"] = time.time()
            state, self._changed = dict(self._state), False
        try:
            self._store.write_json(live_path(self._attempt), state)
        except Exception as error:  # a storage that is away for a moment is no reason to fail
            print(f"what the run does could not be published: {error}")
            self._changed = True
            return False
        return True


JOB = "STILLHOUSE_JOB"  # the id under which Ray knows it
TRIES_LEFT = "STILLHOUSE_TRIES_LEFT"


def job_of_driver() -> str | None:
    """The id of the Ray job that this process is the driver of; None at a terminal."""
    return os.environ.get(JOB)


def tries_left() -> int:
    """How often the run is started again if it fails now."""
    return int(os.environ.get(TRIES_LEFT, "0"))
