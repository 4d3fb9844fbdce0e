"""What a run has written to its log, wherever its driver runs.

On local storage the log is a file of the run directory. On remote storage the driver publishes it
in pieces, `logs/<attempt>-<n>.txt`, so that it outlives the machine.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.storage import Store

FOLDER = "logs"
PIECE_BYTES = 4 << 20
FIRST_SECONDS, LONGEST_SECONDS = 5.0, 60.0
LOCAL_POLL_SECONDS, REMOTE_POLL_SECONDS = 0.5, 3.0
_PIECE = re.compile(r"^(\d+)-(\d+)\.txt$")


class LogSegments:
    """Publishes a growing local log in pieces; does nothing where the log is on the storage."""

    def __init__(self, store: Store, attempt: int, log: Path) -> None:
        self._store, self._attempt, self._log = store, attempt, log
        self._sent, self._next, self._wait = 0, 1, FIRST_SECONDS
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-pieces", daemon=True)

    def __enter__(self) -> LogSegments:
        if self._store.local() is None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._store.local() is None:
            self._ending.set()
            self._thread.join()
            self._publish()

    def _run(self) -> None:
        while not self._ending.wait(self._wait):
            self._publish()
            self._wait = min(LONGEST_SECONDS, 1.3 * self._wait)

    def _publish(self) -> None:
        try:
            with self._log.open("rb") as file:
                file.seek(self._sent)
                while data := file.read(PIECE_BYTES):
                    name = f"{FOLDER}/{self._attempt:04d}-{self._next:05d}.txt"
                    self._store.write_bytes(name, data)
                    self._sent += len(data)
                    self._next += 1
        except Exception as error:  # the rest goes with the next piece
            print(f"the log could not be published: {error}")


def read_log(run: Store, attempt: int, follow: Callable[[], bool] | None = None) -> Iterator[bytes]:
    """The log of an attempt, in pieces; with `follow` what is added, as long as that says True."""
    seen = 0
    done: set[str] = set()
    while True:
        # Asked before reading: what is written until it ends is still read.
        going = follow is not None and follow()
        local = run.local(f"{FOLDER}/{attempt:04d}.log")
        if local is not None:
            if local.exists():
                with local.open("rb") as file:
                    file.seek(seen)
                    while data := file.read(PIECE_BYTES):
                        seen += len(data)
                        yield data
        else:
            for name in run.list(FOLDER):
                found = _PIECE.match(name)
                if found and int(found[1]) == attempt and name not in done:
                    done.add(name)
                    yield run.read_bytes(f"{FOLDER}/{name}")
        if not going:
            return
        time.sleep(REMOTE_POLL_SECONDS if local is None else LOCAL_POLL_SECONDS)
