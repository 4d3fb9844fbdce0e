"""Where a job is to run: nodes, workers of each stage, GPU types, and the speed of a CPU core."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.capacity import Group, NotEnough, fit_group
from cluster.session import Cluster
from jobs.errors import SpecErrors
from jobs.spec.job import JobSpec
from trainer.processor import DtypeName, Kind, cpu_dtype, cpu_kind

# float32 operations per second of one core, where it cannot be asked. 58.8e9 were measured in
# torch on a cloud machine with AVX2 alone, 102e9 on a Zen 4; the others follow from the width of
# their units at 2.5 GHz.
FLOAT32_FLOPS: dict[Kind, float] = {
    "avx2": 60e9,
    "avx512": 100e9,
    "avx512_bf16": 100e9,
    "amx": 130e9,
    "neon": 50e9,
    "generic": 15e9,
}
# Time of a float32 product in torch over that of the same in bfloat16. Measured: 2.1 and .33 on a
# Zen 4 with and without its bf16 instructions (512 x 512, one thread); with AVX2 alone 1/8 to 1/55.
# Of amx and neon it is assumed.
BFLOAT16_GAIN: dict[Kind, float] = {
    "avx2": 0.05,
    "avx512": 0.33,
    "avx512_bf16": 2.1,
    "amx": 8.0,
    "neon": 0.1,
    "generic": 0.05,
}
NEON_BF16_GAIN = 2.0  # of one with the instructions for it
# What numpy's BLAS must leave unused to measure what torch will use.
BLAS_CORES = {"avx2": "Haswell"}
MEASURE_LIMIT_S = 30.0


@dataclass(frozen=True)
class Core:
    """One core. kind: of its instruction set. dtype: what it is fastest in. float32: operations
    per second of a product of matrices. measured: whether on the machine itself."""

    kind: Kind
    dtype: DtypeName
    float32: float
    measured: bool

    def flops(self, dtype: DtypeName) -> float:
        """Operations per second of products in a dtype."""
        if dtype == "float32":
            return self.float32
        gain = BFLOAT16_GAIN[self.kind]
        if self.kind == "neon" and self.dtype == "bfloat16":
            gain = NEON_BF16_GAIN
        return self.float32 * gain

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "kind": self.kind,
            "float32_flops": self.flops("float32"),
            "bfloat16_flops": self.flops("bfloat16"),
            "measured": self.measured,
        }


# Of a machine with GPUs that is only named.
ASSUMED = Core("avx512_bf16", "bfloat16", FLOAT32_FLOPS["avx512_bf16"], False)


def this_core() -> Core:
    """A core of this machine, measured in a quarter of a second; by the table if that fails."""
    kind = cpu_kind()
    measured = _measure(kind)
    return Core(kind, cpu_dtype(), measured or FLOAT32_FLOPS[kind], measured is not None)


def _measure(kind: Kind) -> float | None:
    """In a process of its own: this one's BLAS may have threads already."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(threads, "1")}
    if kind in BLAS_CORES:
        environment["OPENBLAS_CORETYPE"] = BLAS_CORES[kind]
    command = [sys.executable, "-P", str(Path(__file__).with_name("measure_core.py"))]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(
            command, env=environment, check=True, timeout=MEASURE_LIMIT_S,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        return float(done.stdout)
    return None


def slowest(cores: Iterable[Core]) -> Core | None:
    """The core that the others wait for; None of none."""
    return min(cores, key=lambda core: core.float32, default=None)


GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A type of GPU. memory: bytes. flops, flops32: dense operations per second at its peak, in
    bf16 and in float32 (torch leaves TF32 off).

    marks: what the name that its driver gives holds, in lower case, all of them.
    """

    key: str
    memory: int
    flops: float
    flops32: float
    marks: tuple[str, ...]

    def peak(self, dtype: DtypeName) -> float:
        """Operations per second in a dtype."""
        return self.flops if dtype == "bfloat16" else self.flops32


# Memory is about what drivers report. Peaks are of the makers' data sheets, dense (half of what is
# printed "with sparsity"): bf16 with float32 sums, and float32 without tensor units.
GPUS = {
    gpu.key: gpu
    for gpu in (
        Gpu("b200", 178 * GIB, 2250e12, 75e12, ("b200",)),  # NVIDIA DGX B200 data sheet, 2024
        Gpu("h200", 139 * GIB, 989e12, 67e12, ("h200",)),  # NVIDIA H200 data sheet, SXM
        Gpu("h100", 80 * GIB, 989e12, 67e12, ("h100",)),  # NVIDIA H100 data sheet, SXM
        Gpu("h100-pcie", 80 * GIB, 756e12, 51e12, ("h100", "pcie")),  # the same, PCIe
        Gpu("a100-80", 80 * GIB, 312e12, 19.5e12, ("a100", "80g")),  # NVIDIA A100 data sheet
        Gpu("a100-40", 40 * GIB, 312e12, 19.5e12, ("a100",)),  # the same
        Gpu("mi300x", 192 * GIB, 1307e12, 163e12, ("mi300x",)),  # AMD Instinct MI300X data sheet
        Gpu("l40s", 48 * GIB, 362e12, 91.6e12, ("l40s",)),  # NVIDIA L40S data sheet
        Gpu("l4", 24 * GIB, 121e12, 30.3e12, ("l4",)),  # NVIDIA L4 data sheet, 242 with sparsity
        Gpu("a10g", 24 * GIB, 70e12, 31.2e12, ("a10g",)),  # Amazon EC2 G5, NVIDIA A10G data sheet
        Gpu("4090", 24 * GIB, 165e12, 82.6e12, ("4090",)),  # NVIDIA Ada white paper, table 2
        Gpu("3090", 24 * GIB, 71e12, 35.6e12, ("3090",)),  # NVIDIA GA102 white paper, table 9
    )
}


def find_gpu(key: str) -> Gpu:
    """The GPU of a key. Raises SpecErrors that lists those known."""
    if key.lower() in GPUS:
        return GPUS[key.lower()]
    raise SpecErrors([f'--gpu: got "{key}"; may be one of {", ".join(GPUS)}'])


def gpu_named(name: str) -> Gpu | None:
    """The GPU that a driver calls so, e.g. "NVIDIA H100 80GB HBM3"; None for one not known."""
    words = name.lower().replace("-", " ")
    fitting = [gpu for gpu in GPUS.values() if all(_has(words, mark) for mark in gpu.marks)]
    return max(fitting, key=lambda gpu: len(gpu.marks), default=None)


def _has(words: str, mark: str) -> bool:
    """Whether a word begins with the mark: "a100-sxm4-80gb" has a100, "l40s" has no l4."""
    return any(word == mark or (word.startswith(mark) and mark != "l4") for word in words.split())


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
        return None if self.host is None else self.host / self.workers_per_node(group)

    def workers_per_node(self, group: Group) -> int:
        """The most workers of a group that share a node."""
        return max(map(len, self.ranks(group)))

    def ranks(self, group: Group) -> list[list[int]]:
        """The ranks of a group by node, filled up one node after the other."""
        result: list[list[int]] = []
        left = list(range(group.workers))
        for cpus, gpus in self.nodes:
            capacity = int(min(cpus // group.cpus, gpus // group.gpus if group.gpus else 1 << 30))
            if capacity and left:
                result.append(left[:capacity])
                left = left[capacity:]
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
