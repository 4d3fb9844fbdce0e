"""The connection to Ray: an embedded local cluster, or one that runs already."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# What travels to the workers of a running cluster, and what must not.
_EXCLUDES = [".git", ".venv", "runs", "wandb", "**/__pycache__", ".*_cache", "*.egg-info"]


@dataclass(frozen=True)
class Cluster:
    """Resources of the cluster that this process is connected to."""

    address: str
    nodes: tuple[tuple[int, int], ...]  # CPUs and GPUs of each
    embedded: bool
    machines: int = 1  # hosts; several nodes of a test may be on one

    @property
    def cpus(self) -> int:
        """CPUs of all nodes."""
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(gpus for _, gpus in self.nodes)

    def room(self, cpus: float, gpus: float) -> int:
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
    Raises ConnectionError if there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Ray 2.60 warns about this default in every worker; the new behaviour is what we want.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray

    where = target(address)
    embedded = where == "local"
    if embedded:
        # Not RAY_ADDRESS: with it set, a plain init would join that cluster instead.
        ray.init(address="local", dashboard_host="127.0.0.1", logging_level=logging.INFO)
    else:
        inside_job = "RAY_JOB_ID" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        root = Path(__file__).resolve().parent.parent
        environment = None if inside_job else {"working_dir": str(root), "excludes": _EXCLUDES}
        try:
            ray.init(address=where, runtime_env=environment, logging_level=logging.INFO)
        except ConnectionError as error:
            raise ConnectionError(
                f"no Ray cluster at {where}; start one with `ray start --head`, or leave "
                "--address out for an embedded one"
            ) from error
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes = tuple(
            (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
            for node in alive
        )
        machines = len({node["NodeManagerHostname"] for node in alive})
        yield Cluster(where, nodes, embedded, machines)
    finally:
        ray.shutdown()


def nodes_without(path: str, cluster: Cluster) -> list[str]:
    """Addresses of the cluster's nodes on which the file `path` is not there."""
    if len(cluster.nodes) == 1 and cluster.embedded:
        return []
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(_exists)
    asked = [
        (
            node["NodeManagerAddress"],
            look.options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(path),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return [address for address, reference in asked if not ray.get(reference)]


def _exists(path: str) -> bool:
    return os.path.exists(path)
