"""The most memory that a rank held while it worked."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from trainer.worker import Worker


class PeakMemory:
    """Memory of this process from here on.

    On a GPU the most that torch had allocated; on a CPU by how much the resident memory grew at the
    most, so what was imported before is not in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._before: int | None = None
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            return
        with contextlib.suppress(OSError):  # needs Linux; a container may refuse it
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): reset the high-water mark
            self._before = _resident("VmRSS")

    def bytes(self) -> int | None:
        """Bytes at the peak by now; None where the system does not tell."""
        if self._cuda is not None:
            return int(torch.cuda.max_memory_allocated(self._cuda))
        highest = _resident("VmHWM")
        if highest is None or self._before is None:
            return None
        return max(0, highest - self._before)

    def largest(self, worker: Worker) -> int | None:
        """Of all ranks the one that held most; collective."""
        found = [value for value in worker.gather(self.bytes()) if value is not None]
        return max(found, default=None)


def _resident(field: str) -> int | None:
    """A figure of /proc/self/status in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
