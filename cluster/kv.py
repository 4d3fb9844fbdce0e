"""Messages through Ray's own key-value store: progress of tasks, and more work for a running group.

The store is there wherever a process of the cluster runs, at no process of its own. Reports of
progress may be lost, with the task's process or while the store is unreachable: nothing depends on
them. A group's function asks for more work when it has done what it was started with: processes
that have imported everything go on, where new ones would take a quarter of a minute to start.
"""

from __future__ import annotations

import json
import pickle
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol


def store() -> Any:  # noqa: ANN401
    """Ray's module of it, imported when it is used first."""
    from ray.experimental import internal_kv

    return internal_kv


_HANDOVER = "worker-groups"
_POLL_S = 0.2
# A group that was forgotten gives its resources back.
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Handover:
    """One group's pieces of work, numbered from 1. Picklable: the driver puts, the group takes."""

    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def put(self, number: int, work: object) -> None:
        """Hands over a piece of work; None: there is no more."""
        from ray import cloudpickle

        store()._internal_kv_put(self._key(number), cloudpickle.dumps(work), namespace=_HANDOVER)

    def take(self, number: int) -> bytes:
        """Waits for a piece of work, and returns it pickled; None, pickled, if none comes."""
        ends = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < ends:
            found: bytes | None = store()._internal_kv_get(self._key(number), namespace=_HANDOVER)
            if found is not None:
                return found
            time.sleep(_POLL_S)
        return pickle.dumps(None)

    def clear(self) -> None:
        """Forgets everything."""
        store()._internal_kv_del(f"{self.name}/", del_by_prefix=True, namespace=_HANDOVER)

    def _key(self, number: int) -> str:
        return f"{self.name}/{number}"


_NAMESPACE = "task-progress"
# Between two writes of a task, and between two reads of the driver.
NOTIFY_S = 1.0
# Tasks that the driver asks about in one read; the others have their turn in the next.
_READS = 32


class Report(Protocol):
    """What a task calls to say how far it is: the share of its work done, and in words."""

    def __call__(self, done: float, words: str) -> None: ...


def silent(done: float, words: str) -> None:
    """A `Report` to nobody."""


@dataclass(frozen=True)
class Progress:
    """How far a task is. done: the share of its work, 0 to 1. words: what it is at."""

    done: float
    words: str


@contextmanager
def reporting(key: str | None) -> Iterator[Report]:
    """A `Report` for the task whose progress is read at `key`; None: nobody reads it.

    Calling it only keeps the newest; a thread writes that, so that a task never waits for Ray.
    """
    if key is None:
        yield silent
        return
    newest: list[bytes] = []
    over = threading.Event()

    def report(done: float, words: str) -> None:
        newest[:] = [json.dumps([min(max(done, 0.0), 1.0), words]).encode()]

    def write() -> None:
        written = b""
        while not over.wait(NOTIFY_S):
            for value in newest[:]:
                if value != written:
                    with suppress(Exception):  # progress is never worth a task
                        store()._internal_kv_put(key, value, namespace=_NAMESPACE)
                        written = value

    thread = threading.Thread(target=write, name="progress", daemon=True)
    thread.start()
    try:
        yield report
    finally:
        over.set()


@dataclass
class Board:
    """The driver's view of the progress of its tasks."""

    _name: str = field(default_factory=lambda: uuid.uuid4().hex)
    _made: int = 0
    _seen: dict[str, bytes] = field(default_factory=dict)

    def new_key(self) -> str:
        """A key for one attempt at a task."""
        self._made += 1
        return f"{self._name}/{self._made}"

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Progress]]:
        """What has changed at some of `keys` since it was read last."""
        order = {key: place for place, key in enumerate(self._seen)}
        for key in sorted(keys, key=lambda key: order.get(key, -1))[:_READS]:
            value = None
            with suppress(Exception):
                value = store()._internal_kv_get(key, namespace=_NAMESPACE)
            before = self._seen.pop(key, None)
            self._seen[key] = value or before or b""  # at the end: others come first next time
            if value and value != before:
                yield key, Progress(*json.loads(value))

    def drop(self, key: str) -> None:
        """Forgets a key whose task has ended."""
        if self._seen.pop(key, None):
            self._delete(key)

    def close(self) -> None:
        """Forgets all keys."""
        if self._made:
            self._delete(f"{self._name}/", del_by_prefix=True)

    def _delete(self, key: str, **how: Any) -> None:
        with suppress(Exception):
            store()._internal_kv_del(key, namespace=_NAMESPACE, **how)
