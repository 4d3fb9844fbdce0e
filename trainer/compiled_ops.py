"""DeepSpeed's compiled op: where it lies, building it, and dropping stale locks on it.

    python -m trainer.compiled_ops

builds it once, so that no job waits for a compiler: 20 to 40 seconds, with g++ and ninja; later
calls find it built.

Each Python environment has a folder of its own: torch has one for all environments of a user, and
as what is built there names the paths of its own, two environments in turns would compile it each
time. torch locks an op whenever it loads it, by a file that exists, and waits for that without
limit: a worker that is killed in that moment would leave no training able to start on the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path


def ops_folder() -> Path:
    """The folder: TORCH_EXTENSIONS_DIR, which is set where it is not, so that torch has it too."""
    if not os.environ.get("TORCH_EXTENSIONS_DIR"):
        own = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
        folder = Path.home() / ".cache" / "torch_extensions" / f"stillhouse-{own}"
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])


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


def build() -> None:
    """Compiles the op, or finds it compiled. Raises RuntimeError when the compiler fails."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    ops_folder()  # torch builds there
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("ShareMemCommBuilder").load()


if __name__ == "__main__":
    build()
