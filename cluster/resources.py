"""What a task needs of a node, and what the nodes of the cluster have."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.failures import Failure, Kind, one_line
from cluster.session import GPU_TYPE
from cluster.storage.store import format_bytes

# Shares of CPUs and GPUs are floats: ten of 0.1 fit on 1.
_FUZZ = 1e-9


@dataclass(frozen=True)
class ResourceRequest:
    """What one task takes of its node. memory: bytes of Ray's logical `memory`, 0 for no claim.
    gpu_type: only nodes that have these GPUs will do, as Ray calls them; "" for all nodes.

    Raises ValueError for a negative number, and for GPUs that Ray refuses: above 1 and not whole.
    """

    cpus: float
    gpus: float = 0
    memory: int = 0
    gpu_type: str = ""

    def __post_init__(self) -> None:
        if min(self.cpus, self.gpus, self.memory) < 0:
            raise ValueError(f"a need is negative: {self}")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"a task's GPUs above 1 must be a whole number, not {self.gpus:g}")

    def times(self, node: Mapping[str, float]) -> int:
        """How many such tasks fit at once on a node of Ray's resources `node`."""
        # A task that takes nothing is still a process.
        asked = {"CPU": max(self.cpus, 0.01), "GPU": self.gpus}
        counts = [
            math.floor(node.get(name, 0.0) / amount + _FUZZ)
            for name, amount in asked.items()
            if amount > 0
        ]
        if self.memory:
            counts.append(int(node.get("memory", 0)) // self.memory)
        if self.gpu_type and not node.get(GPU_TYPE + self.gpu_type):
            return 0
        return min(counts)

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPUs"]
        if self.gpus:
            parts.append(f"{self.gpus:g} {self.gpu_type} GPUs".replace("  ", " "))
        if self.memory:
            parts.append(f"{format_bytes(self.memory)} of memory")
        return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


class Nodes:
    """The living nodes of the cluster that this process is connected to, as they come and go."""

    def __init__(self, every_s: float = 5.0) -> None:
        """every_s: seconds after which `refresh` asks Ray again."""
        self._every_s = every_s
        self._asked = -math.inf
        self.living: dict[str, dict[str, float]] = {}
        self.changes = 0  # how often those were others
        self._seen: dict[str, dict[str, float]] = {}  # those that have gone too
        self._capacities: dict[ResourceRequest, int] = {}
        self._holders: dict[ResourceRequest, frozenset[str]] = {}
        self._unschedulable: dict[
            ResourceRequest, float
        ] = {}  # since when no living node could hold it

    def refresh(self, now: bool = False) -> bool:
        """Asks Ray for its nodes, if it is time or `now`; returns whether it did."""
        if not now and time.monotonic() - self._asked < self._every_s:
            return False
        import ray

        self._asked = time.monotonic()
        self.learn({node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]})
        return True

    def learn(self, living: Mapping[str, Mapping[str, float]]) -> None:
        """Takes over the living nodes: their resources in all, by Ray's id."""
        if living == self.living:
            return
        self.living = {node: dict(resources) for node, resources in living.items()}
        self._seen.update(self.living)
        self._capacities.clear()
        self._holders.clear()
        self.changes += 1
        for need in list(self._unschedulable):
            if self.capacity(need):
                del self._unschedulable[need]

    def capacity(self, need: ResourceRequest) -> int:
        """How many tasks of this need the living nodes hold at once."""
        if need not in self._capacities:
            self._capacities[need] = sum(need.times(node) for node in self.living.values())
        return self._capacities[need]

    def holders(self, need: ResourceRequest) -> frozenset[str]:
        """The living nodes that could hold a task of this need."""
        if need not in self._holders:
            living = self.living.items()
            self._holders[need] = frozenset(name for name, node in living if need.times(node))
        return self._holders[need]

    def seconds_unschedulable(self, need: ResourceRequest) -> float:
        """For how many seconds no living node could hold it; infinite if none ever could."""
        if self.capacity(need):
            return 0.0
        if not any(need.times(node) for node in self._seen.values()):
            return math.inf
        since = self._unschedulable.setdefault(need, time.monotonic())
        return time.monotonic() - since

    def lacking(self, need: ResourceRequest) -> Failure:
        """Why no living node can hold it, with the numbers."""
        nodes = self.living.values()
        largest = max((node.get("memory", 0.0) for node in nodes), default=0.0)
        kind: Kind
        if not nodes:
            error, kind = f"needs {need}, the cluster has no node left", "resources"
        elif need.memory > largest:
            error = (
                f"needs {format_bytes(need.memory)} of memory, the largest node has "
                f"{format_bytes(largest)}"
            )
            kind = "memory"
        else:
            slimmer = ResourceRequest(need.cpus, need.gpus)
            kind = "memory" if any(slimmer.times(node) for node in nodes) else "resources"
            error = f"needs {need}, no node has that (nodes: {self})"
        return Failure(one_line(error), f"{error}\nnodes: {self}", kind)

    def __str__(self) -> str:
        kinds = Counter(
            f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs, "
            f"{format_bytes(node.get('memory', 0))}"
            for node in self.living.values()
        )
        return "; ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items())) or "none"
