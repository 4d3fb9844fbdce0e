"""What the user sees, and where everything else goes.

The chatter of Ray, DeepSpeed and their children is written to file descriptors 1 and 2, not through
Python, so these descriptors are pointed at a log file; the user's terminal keeps a copy of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from cluster.storage import Store


def log_file(run: Store, attempt: int) -> Path:
    """The log of an attempt: in the run directory where that is local, else in the user's cache."""
    local = run.local("logs")
    if local is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        # Runs of one name may be on several storages.
        place = hashlib.blake2b(run.url.encode(), digest_size=4).hexdigest()
        local = cache / "stillhouse" / "logs" / f"{run.name}-{place}"
    local.mkdir(parents=True, exist_ok=True)
    return local / f"{attempt:04d}.log"


@contextlib.contextmanager
def chatter_to(path: Path) -> Iterator[Console]:
    """Sends file descriptors 1 and 2 to `path`; yields a console on the real terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    terminal = io.TextIOWrapper(os.fdopen(os.dup(saved[0]), "wb", buffering=0), write_through=True)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        yield Console(file=terminal, highlight=False)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(saved, start=1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(target)
        terminal.flush()
