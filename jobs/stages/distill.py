"""distill: the student learns, and beside it, if wanted, a control without the teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster.capacity import Group
from cluster.spec import CellResources, WorkerResources
from jobs.run.context import Context
from jobs.run.inputs import Outputs, ResolvedJob, StageInputs
from jobs.spec.job import JobSpec
from jobs.stages.capture import devices
from trainer.checks import world_faults
from trainer.stage_inputs import training_inputs


def is_asked(spec: JobSpec) -> bool:
    """Unless the spec sweeps its student as it is."""
    return spec.distill is not None


def inputs(job: ResolvedJob, outputs: Outputs) -> StageInputs:
    """What the weights depend on; a control may be added later."""
    spec = job.spec
    assert spec.distill is not None
    cache = outputs["capture"]["cache"] if spec.teacher is not None else None
    fixed = training_inputs(spec, job.names, outputs["prepare"]["corpus"], cache)
    return StageInputs(fixed, {"distill.control": spec.distill.control})


def faults(job: ResolvedJob) -> list[str]:
    """Models that are not there, or cannot be trained as the spec asks."""
    return world_faults(job.spec, job.names, ["distill"])


def resources(spec: JobSpec) -> dict[str, WorkerResources | CellResources]:
    """A group of workers."""
    return {"distill": spec.resources.distill}


def run(context: Context) -> dict[str, Any]:
    """Trains what is not trained yet, in one launch; returns hashes and metrics of the models."""
    from jobs.stages.worker_group import run_ranks

    # Those that the plan would not have let through unless a stage before was asked for anew.
    for path, step in drop_others(context).items():
        context.reporter.say(
            f"distill: dropped {path}, an unfinished training of other inputs at step {step}"
        )
    work = trainings(context)
    results, group = run_ranks(context, "distill", work, context.spec.resources.distill)
    outputs: dict[str, Any] = {"metrics": _costs(group, results)}
    for job, metrics in zip(work, results, strict=True):
        outputs[job.output.name] = metrics["weights"]
        outputs["metrics"][job.stage] = metrics
    return outputs


def _costs(group: Group, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the trainings cost, with all attempts, each on as many workers as it had by then."""
    one = replace(group, workers=1)
    spent = [devices(one, [{"seconds": result["worker_seconds"]}]) for result in results]
    return {**spent[0], "device_hours": sum(part["device_hours"] for part in spent)}


def reset(context: Context) -> None:
    """Drops what these trainings have left, finished or not, and unfinished ones before them."""
    drop_others(context)
    for job in trainings(context):
        if job.checkpoints.exists():
            job.checkpoints.delete("", recursive=True)


def drop_others(context: Context) -> dict[str, int]:
    """Deletes unfinished trainings of other inputs; returns the steps they had, by folder."""
    from trainer.training.unfinished import unfinished_trainings

    fixed = inputs(context.job, context.outputs).fixed
    store = context.run.store
    others = unfinished_trainings(context.spec, fixed, store)
    if others:
        context.attempt.fence()
    for path in others:
        store.delete(path, recursive=True)
    return {store.path(path): step for path, (step, _) in others.items()}


def trainings(context: Context) -> list[Any]:
    """The trainings of this job."""
    from trainer.tasks import make_trainings

    fixed = inputs(context.job, context.outputs).fixed
    return make_trainings(context.spec, fixed, context.run.store, context.corpus, context.cache)


def remark(outputs: dict[str, Any]) -> str:
    """Perplexity on select, of the student and the control."""
    metrics = outputs["metrics"]
    parts = [
        f"{name} {metrics[name]['select_perplexity']:.2f}"
        for name in ("distill", "control")
        if name in metrics
    ]
    return "perplexity on select: " + ", ".join(parts)
