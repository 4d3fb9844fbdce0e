"""The connection to Ray: an embedded local cluster, or one that runs already."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

# How Ray names the resource that says which GPUs a node has: "accelerator_type:H100".
GPU_TYPE = "accelerator_type:"
# After Ray's end its processes have so long to go by themselves.
END_SECONDS = 10.0


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs, shares included."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Cluster:
    """Resources of the cluster that this process is connected to."""

    address: str
    nodes: tuple[tuple[int, int], ...]  # CPUs and GPUs of each
    embedded: bool
    machines: int = 1  # hosts; several nodes of a test may be on one
    memory: float | None = None  # bytes that Ray has on the node with the least
    gpu_types: tuple[str, ...] = ()  # of each node, as Ray calls it; "" where there is none

    @property
    def cpus(self) -> int:
        """CPUs of all nodes."""
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(gpus for _, gpus in self.nodes)

    def capacity(self, cpus: float, gpus: float) -> int:
        """How many workers of so many CPUs and GPUs fit at once; each must fit on one node."""
        return sum(
            int(min(node_cpus // cpus if cpus else 1e9, node_gpus // gpus if gpus else 1e9))
            for node_cpus, node_gpus in self.nodes
        )


def target(address: str | None) -> str:
    """Where `connect(address)` goes: "local" or an address; RAY_ADDRESS is honoured."""
    return address or os.environ.get("RAY_ADDRESS") or "local"


@contextmanager
def connect(address: str | None = None) -> Iterator[Cluster]:
    """Connects to Ray for the time of the block; an embedded cluster ends with it.

    address: None (RAY_ADDRESS if set, else embedded), "local" (embedded), "auto", or HOST:PORT.
    Raises ConnectionError if there is no cluster at the address, TooLarge for a checkout that
    would have to travel there and is too large.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Ray 2.60 warns about this default in every worker; the new behaviour is what we want.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray

    where = target(address)
    embedded = where == "local"
    before = _children()
    if embedded:
        # One machine is not taken away with notice: a process less in every launch of a group.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # How often a group is looked at: its end is noticed after half of that.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        # Not RAY_ADDRESS: with it set, a plain init would join that cluster instead.
        ray.init(address="local", dashboard_host="127.0.0.1", logging_level=logging.INFO)
    else:
        try:
            ray.init(address=where, runtime_env=_environment(), logging_level=logging.INFO)
        except ConnectionError as error:
            raise ConnectionError(
                f"no Ray cluster at {where}; start one with `ray start --head`, or leave "
                "--address out for an embedded one"
            ) from error
    started = [process for process in _children() if process not in before] if embedded else []
    try:
        yield refresh(Cluster(where, (), embedded))
    finally:
        started += [child for process in started for child in _children(process)]
        ray.shutdown()
        _outlive(started)


def inside_job() -> bool:
    """Whether this process is the driver of a Ray job, to which the checkout has travelled."""
    return "RAY_JOB_ID" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def refresh(cluster: Cluster) -> Cluster:
    """The cluster with the nodes that it has now."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    resources = [node["Resources"] for node in alive]
    return replace(
        cluster,
        nodes=tuple((int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources),
        machines=len({node["NodeManagerHostname"] for node in alive}),
        memory=min(map(_memory, resources), default=None),
        gpu_types=tuple(_gpu_type(each) for each in resources),
    )


def ask_to_grow(bundles: Sequence[Mapping[str, float]]) -> None:
    """Tells the autoscaler, where there is one, to have nodes for all of these at once."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle) for bundle in bundles])


def free() -> tuple[Resources, Resources]:
    """What the cluster that this process is connected to has, and what of that is free now."""
    import ray

    both = ray.cluster_resources(), ray.available_resources()
    has, idle = (Resources(each.get("CPU", 0), each.get("GPU", 0)) for each in both)
    return has, idle


def _memory(resources: Mapping[str, float]) -> float:
    return resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0)


def _gpu_type(resources: Mapping[str, float]) -> str:
    found = sorted(name for name in resources if name.startswith(GPU_TYPE))
    return found[0].removeprefix(GPU_TYPE) if found else ""


def _environment() -> dict[str, Any] | None:
    """The runtime environment of this driver's workers: the checkout, unless a job brought it."""
    if inside_job():
        return None
    from cluster.working_dir import check_size, checkout, ray_excludes, travelling

    root = checkout()
    check_size(travelling(root), root)
    return {"working_dir": str(root), "excludes": ray_excludes()}


def _children(process: Any = None) -> list[Any]:  # noqa: ANN401
    """Processes that this one, or `process`, has started; of the latter also theirs."""
    import psutil

    if process is None:
        return psutil.Process().children()
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _outlive(processes: list[Any]) -> None:
    """Returns when the processes of an embedded Ray are gone; ends those that linger."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=END_SECONDS)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=END_SECONDS)
