"""sweep: every cell quantized and evaluated as a task, then its speed measured alone."""

from __future__ import annotations

import time
from typing import Any

from cluster.spec import CellResources, WorkerResources
from jobs.errors import Interrupted
from jobs.run.context import Context
from jobs.run.inputs import Outputs, ResolvedJob, StageInputs
from jobs.spec.job import JobSpec


def is_asked(spec: JobSpec) -> bool:
    """Unless `sweep: null` ends the run with the training."""
    return spec.sweep is not None


def inputs(job: ResolvedJob, outputs: Outputs) -> StageInputs:
    """Nothing is fixed: each cell has a fingerprint of its own."""
    from jobs.sweep import fingerprints

    return StageInputs({}, fingerprints.of_sweep(job, outputs))


def faults(job: ResolvedJob) -> list[str]:
    """Models that cannot be quantized as the spec asks; tasks that are not there."""
    from jobs.sweep.checks import sweep_faults

    return sweep_faults(job)


def resources(spec: JobSpec) -> dict[str, WorkerResources | CellResources]:
    """Tasks, as many side by side as there is room for."""
    return {"sweep": spec.resources.sweep}


def run(context: Context) -> dict[str, Any]:
    """Runs what is missing or failed; a failing cell is a recorded result, the others go on."""
    from cluster.fanout import Cancelled
    from jobs.sweep.scheduler import Sweep

    began = time.time()
    sweep = Sweep(context)
    try:
        sweep.evaluate()
        sweep.measure()
    except Cancelled:
        raise Interrupted("sweep stopped; finished cells are kept") from None
    sweep.tidy()
    return sweep.outputs(time.time() - began)


def reset(context: Context) -> None:
    """Nothing: `Context.forced` has every cell made anew."""


def remark(outputs: dict[str, Any]) -> str:
    """Cells, and those that failed."""
    metrics = outputs["metrics"]
    return f"{metrics['cells']} cells, {metrics['failed']} failed"
