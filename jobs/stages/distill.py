"""distill: the student learns, and beside it, if wanted, a control without the teacher."""

from __future__ import annotations

from typing import Any

from jobs.stages.base import Context
from jobs.stages.capture import devices
from jobs.stages.ranks import run_ranks
from trainer.identity import fingerprint


def run(context: Context) -> dict[str, Any]:
    """Trains what is not trained yet, in one launch; returns hashes and metrics of the models."""
    from trainer.models import hash_files

    work = trainings(context)
    assert context.spec.distill is not None
    results, group = run_ranks(context, "distill", work, context.spec.resources.distill)
    outputs: dict[str, Any] = {"metrics": devices(group, results)}
    for job, metrics in zip(work, results, strict=True):
        role = job.output.name
        folder = context.run.store.fetch_folder(role)
        outputs[role] = hash_files(sorted(folder.glob("*.safetensors")))
        outputs["metrics"][job.stage] = metrics
    return outputs


def trainings(context: Context) -> list[Any]:
    """The trainings of this job; checkpoints are kept apart by what the weights depend on."""
    from trainer.loop import Training

    spec, store = context.spec, context.run.store
    assert spec.distill is not None and spec.data is not None
    fixed = context.inputs.distill(context.outputs).fixed
    jobs = []
    for stage, role, losses in (
        ("distill", "student", spec.distill.losses),
        ("control", "control", {"ce": 1.0}),
    ):
        if stage == "control" and not spec.distill.control:
            continue
        distill = spec.distill.model_copy(update={"losses": losses})
        name = f"{stage}-{fingerprint({**fixed, 'losses': losses})[:12]}"
        jobs.append(
            Training(
                stage=stage,
                student=spec.student,
                distill=distill,
                data=spec.data,
                temperatures=tuple(spec.cache.temperatures),
                seed=spec.seed,
                corpus=context.corpus,
                cache=context.cache,
                checkpoints=store.sub("checkpoints", name),
                output=store.sub(role),
            )
        )
    return jobs
