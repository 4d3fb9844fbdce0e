"""Folders on this machine's disk for the time being, which outlive no process for long."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "stillhouse-state-"
# Younger ones may not be locked yet.
_YOUNG_S = 60.0


class Scratch:
    """A new folder below the system's temporary one (TMPDIR); `close` removes it.

    A killed process leaves its folder behind, and one with a checkpoint in it is large: whoever
    makes the next removes those whose lock nobody holds any more.
    """

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Removes it; a second time does nothing."""
        lock, self._lock = self._lock, -1  # first: another thread may close it as well
        if lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path, os.O_RDONLY)
        except OSError:  # removed by now, or another user's
            continue
        try:
            if time.time() - os.fstat(lock).st_mtime > _YOUNG_S:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # in use
            pass
        finally:
            os.close(lock)
