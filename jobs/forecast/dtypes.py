"""What `dtype: auto` becomes: decided once, for the machines that do the work, and kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jobs.spec.job import JobSpec
from trainer.processor import DtypeName, cpu_dtype, this_device
from trainer.resolve_auto import undecided_dtypes


def local_dtypes(spec: JobSpec) -> dict[str, DtypeName]:
    """What each section computes in on this machine alone."""
    return decide_dtypes(spec, this_device() == "cuda", [cpu_dtype()])


def decide_dtypes(
    spec: JobSpec, gpus: bool, cpu_dtypes: Iterable[DtypeName]
) -> dict[str, DtypeName]:
    """What each section computes in: bfloat16 on GPUs; on CPUs what all of them are fast at.

    gpus: whether the cluster has any. cpu_dtypes: `cpu_dtype()` of its nodes.
    """
    on_cpus: DtypeName = "bfloat16" if set(cpu_dtypes) == {"bfloat16"} else "float32"
    asked: dict[str, Any] = {
        "teacher": spec.resources.capture.gpus_per_worker,
        "distill": spec.resources.distill.gpus_per_worker,
        "sweep": spec.resources.sweep.gpus_per_cell,
    }
    found: dict[str, DtypeName] = {}
    for name in undecided_dtypes(spec):
        uses = asked[name]
        if uses == "auto":
            uses = gpus and (name != "sweep" or _cells_want_gpus(spec))
        found[name] = "bfloat16" if uses else on_cpus
    return found


def training_device(spec: JobSpec, gpus: bool) -> str:
    """Where the student is trained, "cpu" or "cuda". gpus: whether the cluster has any."""
    uses = spec.resources.distill.gpus_per_worker
    return "cuda" if (gpus if uses == "auto" else uses) else "cpu"


def _cells_want_gpus(spec: JobSpec) -> bool:
    """Whether `gpus_per_cell: auto` gives cells of this job's models a GPU."""
    from jobs.forecast.models import read_models
    from jobs.forecast.stage_memory import GPU_WEIGHTS

    assert spec.sweep is not None
    models = read_models(spec)
    shapes = {"student": models.student, "teacher": models.teacher}
    sizes = [each.parameters for name in spec.sweep.models if (each := shapes[name]) is not None]
    return max(sizes, default=0) >= GPU_WEIGHTS
