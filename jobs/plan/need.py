"""Memory of one worker, part by part, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.plan.place import USABLE


@dataclass(frozen=True)
class Need:
    """Bytes that one worker of a stage takes at its peak, beyond what its imports take.

    device: parts in the memory that the worker computes in: its GPU's, or the host's on a CPU.
    host: parts in the host's memory beside a GPU. load: of the host's memory while the models are
    loaded, all workers of a node together; start: of the device's at that time, where it may be
    more than later. memory: what a worker has, host_memory: what a node has, None where that is not
    known. workers: of a node.
    """

    device: Mapping[str, float]
    memory: float | None
    host: Mapping[str, float] = field(default_factory=dict)
    start: float = 0.0
    load: float = 0.0
    host_memory: float | None = None
    workers: int = 1

    @property
    def total(self) -> float:
        """Of the device, at its peak."""
        return max(sum(self.device.values()), self.start)

    @property
    def host_total(self) -> float:
        """Of a node's host memory beside its GPUs, at its peak."""
        return max(sum(self.host.values()) * self.workers, self.load)

    @property
    def fits(self) -> bool | None:
        """Whether device and host have room; None where the device's memory is not known."""
        if self.host_memory is not None and self.host_total > USABLE * self.host_memory:
            return False
        return None if self.memory is None else self.total <= USABLE * self.memory

    def to_dict(self) -> dict[str, Any]:
        """As JSON, in whole bytes."""
        return {
            "device": {name: round(size) for name, size in self.device.items()},
            "total": round(self.total),
            "memory": None if self.memory is None else round(self.memory),
            "host": {name: round(size) for name, size in self.host.items()},
            "start": round(self.start),
            "host_total": round(self.host_total),
            "host_load": round(self.load),
            "host_memory": None if self.host_memory is None else round(self.host_memory),
            "workers_per_node": self.workers,
            "fits": self.fits,
        }
