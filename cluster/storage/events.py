"""What happened in a run: immutable segments of JSON lines that many writers may add to."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from cluster.storage import strict_json
from cluster.storage.store import Store

FOLDER = "events"
SEGMENT = re.compile(r"^(\d+)-(\d+)\.jsonl$")
RESERVED = {"t", "attempt", "event"}
LONGEST_INTERVAL_S = 30.0
READERS = 8
# Events of a step, which come again when a resumed attempt takes that step again.
REPLAYED = ("step", "evaluation")

log = logging.getLogger(__name__)


def flush_interval(age_s: float, first_interval_s: float) -> float:
    """Seconds between two segments of a writer of this age: a hundredth of it, within bounds.

    A job of ten hours then makes some 1,400 objects instead of 36,000.
    """
    return min(LONGEST_INTERVAL_S, max(first_interval_s, age_s / 100))


class EventWriter:
    """Collects events and publishes them as `events/<attempt>-<n>.jsonl`, in the background too.

    `emit` never waits for the storage. A segment that cannot be published is kept and tried
    again; only `flush` and `close` raise. Several writers of one attempt take turns in n.
    """

    def __init__(self, store: Store, attempt: int, first_interval_s: float = 1.0) -> None:
        if first_interval_s <= 0:
            raise ValueError(f"first_interval_s is {first_interval_s}; it must be above 0 seconds")
        self.store = store
        self.attempt = attempt
        self._first_interval_s = first_interval_s
        self._began = time.monotonic()
        self._lines: list[bytes] = []
        self._next = 1
        self._buffer_lock = threading.Lock()
        self._publish_lock = threading.Lock()
        self._closing = threading.Event()
        self._timer = threading.Thread(target=self._run, name="events", daemon=True)
        self._timer.start()

    def emit(self, event: str, **fields: Any) -> None:
        """Add one event, stamped with "t" (Unix seconds) and the attempt.

        NaN becomes null and an infinity a string. Raises ValueError for a reserved field name and
        RuntimeError after close.
        """
        taken = RESERVED & fields.keys()
        if taken:
            raise ValueError(f"event {event!r}: field {sorted(taken)[0]!r} is set by the writer")
        if self._closing.is_set():
            raise RuntimeError(f"event {event!r} after the writer was closed")
        head = {"t": round(time.time(), 6), "attempt": self.attempt, "event": event}
        line = strict_json.encode({**head, **fields}, lenient=True)
        with self._buffer_lock:
            self._lines.append(line)

    def flush(self) -> None:
        """Publish what was emitted so far. Raises what the storage raises; nothing is lost then."""
        with self._publish_lock:
            with self._buffer_lock:
                lines, self._lines = self._lines, []
            if not lines:
                return
            try:
                self._publish(b"\n".join(lines) + b"\n")
            except BaseException:
                with self._buffer_lock:
                    self._lines = lines + self._lines
                raise

    def close(self) -> None:
        """Stop the timer and publish the rest."""
        self._closing.set()
        if self._timer is not threading.current_thread():
            self._timer.join()
        self.flush()

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            log.exception("events lost while another error is reported")  # which matters more

    def _publish(self, data: bytes) -> None:
        while not self.store.create(f"{FOLDER}/{self.attempt:04d}-{self._next:06d}.jsonl", data):
            numbers = [n for a, n, _ in _segments(self.store) if a == self.attempt]
            self._next = max([self._next, *numbers]) + 1
        self._next += 1

    def _run(self) -> None:
        while True:
            age = time.monotonic() - self._began
            closing = self._closing.wait(flush_interval(age, self._first_interval_s))
            if closing:
                return
            try:
                self.flush()
            except Exception as error:
                log.warning("events of %s kept for a later try: %s", self.store.url, error)


class EventTail:
    """Follows the events of a run: each `poll` returns those that no earlier poll returned."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._seen: set[str] = set()

    def poll(self) -> list[dict[str, Any]]:
        """New events in order of (attempt, segment, line); one listing when nothing is new."""
        names = [name for _, _, name in _segments(self.store) if name not in self._seen]
        events = _read(self.store, names)
        self._seen.update(names)  # only now: a failed read is repeated by the next poll
        return events


def read_events(store: Store) -> list[dict[str, Any]]:
    """All events in order of (attempt, segment, line), without the steps that were replayed.

    Of `REPLAYED` events of one kind, stage and step the last one stays, at its own place: it is
    from the attempt whose result lives on.
    """
    events = _read(store, [name for _, _, name in _segments(store)])
    last = {_step(event): i for i, event in enumerate(events) if event["event"] in REPLAYED}
    return [e for i, e in enumerate(events) if e["event"] not in REPLAYED or last[_step(e)] == i]


def _step(event: dict[str, Any]) -> tuple[Any, ...]:
    return event["event"], event.get("stage"), event.get("step")


def _segments(store: Store) -> list[tuple[int, int, str]]:
    found = ((SEGMENT.match(name), name) for name in store.list(FOLDER))
    return sorted((int(match[1]), int(match[2]), name) for match, name in found if match)


def _read(store: Store, names: list[str]) -> list[dict[str, Any]]:
    if not names:
        return []
    paths = [f"{FOLDER}/{name}" for name in names]
    with ThreadPoolExecutor(min(READERS, len(paths))) as pool:
        return [e for part in pool.map(lambda p: _parse(store, p), paths) for e in part]


def _parse(store: Store, path: str) -> list[dict[str, Any]]:
    # split, not splitlines: a text may hold characters that splitlines takes for line ends.
    lines = store.read_text(path).split("\n")
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise ValueError(f"{store.path(path)} holds a line that is not JSON: {error}") from error
