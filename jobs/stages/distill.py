"""distill: the student learns, and beside it, if wanted, a control without the teacher."""

from __future__ import annotations

from typing import Any

from jobs.stages.base import Context
from jobs.stages.capture import devices
from jobs.stages.ranks import run_ranks
from trainer.job import make_trainings


def run(context: Context) -> dict[str, Any]:
    """Trains what is not trained yet, in one launch; returns hashes and metrics of the models."""
    work = trainings(context)
    assert context.spec.distill is not None
    results, group = run_ranks(context, "distill", work, context.spec.resources.distill)
    outputs: dict[str, Any] = {"metrics": devices(group, results)}
    for job, metrics in zip(work, results, strict=True):
        outputs[job.output.name] = metrics["weights"]
        outputs["metrics"][job.stage] = metrics
    return outputs


def reset(context: Context) -> None:
    """Drops what these trainings have left, finished or not."""
    for job in trainings(context):
        if job.checkpoints.exists():
            job.checkpoints.delete("", recursive=True)


def trainings(context: Context) -> list[Any]:
    """The trainings of this job."""
    fixed = context.inputs.distill(context.outputs).fixed
    return make_trainings(context.spec, fixed, context.run.store, context.corpus, context.cache)
