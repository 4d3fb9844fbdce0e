"""The plan of a run on the cluster that it has joined, to be kept with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.errors import SpecErrors
from jobs.plan.cores import ASSUMED, Core
from jobs.plan.forecast import forecast
from jobs.plan.place import cluster_place
from jobs.spec import JobSpec


def record(
    spec: JobSpec,
    nodes: Sequence[tuple[int, int]],
    gpu: str | None = None,
    host_memory: float | None = None,
    core: Core | None = None,
) -> dict[str, Any]:
    """What `stillhouse plan` says of a run, as JSON for its `plan.json`.

    nodes: CPUs and GPUs of each. gpu: what the driver or Ray calls them, e.g. "NVIDIA H200" or
    "A100-80G"; hours and fit are left open for a name that is not known. host_memory: bytes of
    one node. core: the slowest CPU core, where the nodes were asked. Never raises for what cannot
    be planned: the plan then holds `faults` alone.
    """
    try:
        return forecast(spec, cluster_place(nodes, gpu, host_memory, core or ASSUMED))
    except (SpecErrors, ValueError) as error:
        return {"format": 1, "name": spec.name, "faults": str(error).splitlines()}
