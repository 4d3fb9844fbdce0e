"""Where a job is planned to run: nodes, devices, and the workers of each stage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.session import Cluster
from cluster.workers import Group, NotEnough, fit_group
from jobs.errors import SpecErrors
from jobs.plan.cores import ASSUMED, Core, this_core
from jobs.plan.gpus import GPUS, Gpu, find_gpu, gpu_named
from jobs.spec import JobSpec
from trainer.processor import DtypeName

# Share of a device's or a host's memory that a plan may fill: allocators leave gaps, and CUDA, its
# libraries and NCCL take about a gigabyte of a GPU.
USABLE = 0.92
# CPUs beside each GPU of a cluster that is only named.
CPUS_PER_GPU = 8
DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Place:
    """Nodes as (CPUs, GPUs), of one kind of GPU; gpu: None without any that is known.

    host: bytes of memory of one node; None where nobody knows. core: one of its CPU cores.
    """

    nodes: tuple[tuple[int, int], ...]
    gpu: Gpu | None
    host: float | None
    core: Core = ASSUMED

    @property
    def cluster(self) -> Cluster:
        """As the stages see it."""
        return Cluster("plan", self.nodes, False, len(self.nodes))

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return sum(gpus for _, gpus in self.nodes)

    def group(self, key: str, spec: JobSpec) -> Group:
        """The workers of capture or distill. Raises SpecErrors where they do not fit."""
        try:
            return fit_group(key, getattr(spec.resources, key), self.cluster)
        except NotEnough as error:
            raise SpecErrors([str(error)]) from error

    def memory(self, group: Group) -> float | None:
        """Bytes of memory of one worker: its GPU's, or its share of the host's."""
        if group.gpus:
            return None if self.gpu is None else float(self.gpu.memory)
        return None if self.host is None else self.host / self.beside(group)

    def beside(self, group: Group) -> int:
        """The most workers of a group that share a node."""
        return max(map(len, self.ranks(group)))

    def ranks(self, group: Group) -> list[list[int]]:
        """The ranks of a group by node, filled up one node after the other."""
        result: list[list[int]] = []
        left = list(range(group.workers))
        for cpus, gpus in self.nodes:
            room = int(min(cpus // group.cpus, gpus // group.gpus if group.gpus else 1 << 30))
            if room and left:
                result.append(left[:room])
                left = left[room:]
        return result

    def flops(self, cpus: int, gpus: float, dtype: DtypeName) -> float | None:
        """Peak operations per second of one worker that computes in a dtype."""
        if not gpus:
            return self.core.flops(dtype) * cpus
        return None if self.gpu is None else self.gpu.peak(dtype) * gpus

    def larger(self, times: int) -> Place:
        """So many times as many nodes; of one node with few GPUs first up to eight of them."""
        cpus, gpus = self.nodes[0]
        if len(self.nodes) == 1 and gpus * times <= 8:
            return replace(self, nodes=((cpus * times, gpus * times),))
        return replace(self, nodes=self.nodes * times)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "nodes": [list(node) for node in self.nodes],
            "gpu": None if self.gpu is None else self.gpu.key,
            "gpu_memory": None if self.gpu is None else self.gpu.memory,
            "gpu_peak_flops": None
            if self.gpu is None
            else {"bfloat16": self.gpu.flops, "float32": self.gpu.flops32},
            "core": self.core.to_dict(),
            "host_memory": self.host,
        }


def named_place(gpu: str, gpus: int, per_node: int | None) -> Place:
    """GPUs that a user asks about. Raises SpecErrors for what there is not."""
    found = find_gpu(gpu)
    per_node = min(8, gpus) if per_node is None else per_node
    if gpus % per_node:
        raise SpecErrors(
            [f"--gpus-per-node: got {per_node} with --gpus {gpus}; may be a divisor of {gpus}"]
        )
    return Place(((CPUS_PER_GPU * per_node, per_node),) * (gpus // per_node), found, None)


def this_machine() -> Place:
    """What an embedded Ray would find here. Raises SpecErrors for GPUs of an unknown type."""
    from trainer.teacher.placement import host_memory

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = _driver_names()
    gpu = gpu_named(names[0]) if names else None
    if names and gpu is None:
        raise SpecErrors(
            [f'--gpu: this machine has "{names[0]}", which is not known; give --gpu, one of '
             f"{', '.join(GPUS)}"]
        )  # fmt: skip
    return Place(((int(cpus or 1), len(names)),), gpu, host_memory(), this_core())


def cluster_place(
    nodes: Sequence[Sequence[int]], gpu: str | None, host: float | None, core: Core = ASSUMED
) -> Place:
    """A cluster that a run has joined. gpu: as Ray or the driver calls it."""
    return Place(
        tuple((int(cpus), int(gpus)) for cpus, gpus in nodes),
        None if gpu is None else gpu_named(gpu),
        host,
        core,
    )


def _driver_names() -> list[str]:
    """The GPUs that NVIDIA's driver names on this machine."""
    names = []
    for path in sorted(DRIVER.glob("*/information")):
        lines = path.read_text(errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return names
