"""Whether the cluster can hold what a spec asks for: groups of workers, and tasks."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.session import Cluster
from cluster.spec import CellResources, WorkerResources


@dataclass(frozen=True)
class Group:
    """How many workers, and what each one has.

    fewest: an elastic group runs with so many to `workers`, as the cluster has room; None: with
    `workers` always.
    """

    workers: int
    cpus: int
    gpus: int
    fewest: int | None = None

    def __str__(self) -> str:
        count = f"{self.workers}" if self.fewest is None else f"{self.fewest} to {self.workers}"
        return f"{count} workers of {self.cpus} CPUs and {self.gpus} GPUs"


class NotEnough(ValueError):
    """The cluster can never hold what was asked for."""


def fit_group(key: str, asked: WorkerResources, cluster: Cluster) -> Group:
    """The worker group for `asked` on this cluster, `auto` resolved.

    Raises NotEnough, with the numbers, when the cluster is too small, for an elastic group for its
    fewest workers: Ray would wait for ever.
    """
    fewest = None
    gpus = (1 if cluster.gpus else 0) if asked.gpus_per_worker == "auto" else asked.gpus_per_worker
    if isinstance(asked.workers, tuple):
        fewest, workers = asked.workers
    elif asked.workers != "auto":
        workers = asked.workers
    elif gpus:
        workers = max(1, cluster.gpus)
    else:
        workers = min(2, max(1, cluster.cpus))
    if asked.cpus_per_worker != "auto":
        cpus = asked.cpus_per_worker
    elif gpus:
        cpus = 1
    else:
        # The largest share with which all fit, as each worker must fit on one node.
        most = max((node_cpus for node_cpus, _ in cluster.nodes), default=1)
        shares = range(max(1, most), 0, -1)
        cpus = next((share for share in shares if cluster.capacity(share, 0) >= workers), 1)
    capacity, needed = cluster.capacity(cpus, gpus), workers if fewest is None else fewest
    if capacity < needed:
        there = ", ".join(f"{c} CPUs and {g} GPUs" for c, g in cluster.nodes)
        raise NotEnough(
            f"resources.{key}: {needed} workers of {cpus} CPUs and {gpus} GPUs do not fit, only "
            f"{capacity} do (nodes: {there}); set resources.{key}.workers or what each has lower"
        )
    return Group(workers, cpus, gpus, fewest)


def fit_task(asked: CellResources, cluster: Cluster, wants_gpu: bool) -> tuple[int, float]:
    """CPUs and GPUs of one task of the sweep, `auto` resolved.

    wants_gpu: whether `auto` takes one where the cluster has GPUs. Raises NotEnough, with the
    numbers, if no node could ever start one.
    """
    cpus = 1 if asked.cpus_per_cell == "auto" else asked.cpus_per_cell
    gpus: float = 1 if cluster.gpus and wants_gpu else 0
    if asked.gpus_per_cell != "auto":
        gpus = asked.gpus_per_cell
    if not cluster.capacity(cpus, gpus):
        there = ", ".join(f"{c} CPUs and {g} GPUs" for c, g in cluster.nodes)
        raise NotEnough(
            f"resources.sweep: a cell of {cpus} CPUs and {gpus:g} GPUs fits no node ({there}); "
            "set cpus_per_cell or gpus_per_cell lower"
        )
    return cpus, gpus
