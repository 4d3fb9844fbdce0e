"""Locks that a killed process has left on a compiled op, and that all others would wait for.

torch takes such a lock whenever it loads an op, as a file that exists, and waits for it without
limit. A worker that is killed in that moment leaves it behind: then no training starts on that
machine any more.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.ops import ops_folder

LOCK = "lock"
LOOK_SECONDS = 5.0
# A machine that shares the folder may hold the lock while it compiles, for 20 to 40 seconds.
STALE_SECONDS = 120.0


@contextlib.contextmanager
def dropping_stale_locks(
    look_s: float = LOOK_SECONDS, stale_s: float = STALE_SECONDS
) -> Iterator[None]:
    """While the block runs, removes locks that are `stale_s` old and open in no process here."""
    ending = threading.Event()

    def watch() -> None:
        while True:
            for path in stale_locks(stale_s):
                print(f"removed {path}, which a killed process had left")
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
            if ending.wait(look_s):
                return

    thread = threading.Thread(target=watch, name="op-locks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def stale_locks(stale_s: float) -> list[Path]:
    """Locks of ops that nobody holds any more."""
    found = []
    for path in ops_folder().glob(f"**/{LOCK}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= stale_s and not _is_open(path):
                found.append(path)
    return found


def _is_open(path: Path) -> bool:
    """Whether a process of this machine, as far as we may look, has the file open."""
    wanted = str(path.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == wanted:
                return True
    return False
