"""capture: the teacher's distributions of all sequences that will be read go to the logit cache."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.spec import CellResources, WorkerResources
from cluster.storage import Store
from jobs.run.context import Context
from jobs.run.inputs import Outputs, ResolvedJob, StageInputs
from jobs.spec.job import JobSpec
from trainer.checks import world_faults
from trainer.stage_inputs import CACHES, CORPORA, capture_inputs

if TYPE_CHECKING:
    from cluster.capacity import Group
    from trainer.teacher.job import Capture


def is_asked(spec: JobSpec) -> bool:
    """Records of select and report are captured of every teacher."""
    return spec.teacher is not None


def inputs(job: ResolvedJob, outputs: Outputs) -> StageInputs:
    """The cache's identity; sequences and sets of draws to hold may grow."""
    growing = {"corpus": outputs["prepare"]["corpus"], **capture_inputs(job.spec)}
    return StageInputs(job.names.cache, growing)


def faults(job: ResolvedJob) -> list[str]:
    """Models that are not there, or cannot teach."""
    return world_faults(job.spec, job.names, ["capture"])


def resources(spec: JobSpec) -> dict[str, WorkerResources | CellResources]:
    """A group of workers."""
    return {"capture": spec.resources.capture}


def run(context: Context) -> dict[str, Any]:
    """Adds what the cache lacks; returns the cache's name and the capture's metrics."""
    from cluster.storage.keys import fingerprint
    from jobs.stages.worker_group import run_ranks
    from trainer.logits.store import open_cache

    spec = context.spec
    identity = context.job.names.cache
    name = fingerprint(identity)
    cache = open_cache(context.shared.sub(CACHES), identity)
    job = _capture(spec, context.corpus, cache, context.outputs)
    if not _lacking(job):  # no need to load the teacher
        return {"cache": name, "metrics": {"sequences": 0}}
    results, group = run_ranks(context, "capture", [job], spec.resources.capture)
    return {"cache": name, "metrics": {**results[0], **devices(group, results)}}


def count_lacking(job: ResolvedJob, outputs: Outputs) -> int:
    """Records that the cache lacks of those that will be read; `outputs`: of the stages done.

    Raises ValueError, one line, for a cache that is damaged.
    """
    corpus = job.storage.sub(CORPORA, outputs["prepare"]["corpus"])
    cache = job.storage.sub(CACHES, outputs["capture"]["cache"])
    return _lacking(_capture(job.spec, corpus, cache, outputs))


def capture_of(spec: JobSpec, corpus: Store, cache: Store) -> Capture:
    """The capture of a spec, with the resources that it asks for."""
    from trainer.tasks import make_capture

    asked = spec.resources.capture
    return make_capture(
        spec, corpus, cache, batch_tokens=asked.batch_tokens, shard_seconds=asked.shard_seconds
    )


def _capture(spec: JobSpec, corpus: Store, cache: Store, outputs: Outputs) -> Capture:
    """What the stages to come read: once the student is trained, records for evaluation alone."""
    job = capture_of(spec, corpus, cache)
    return replace(job, distill=None) if "distill" in outputs else job


def _lacking(job: Capture) -> int:
    from trainer.corpus.corpus import open_corpus
    from trainer.teacher.job import missing

    return sum(len(numbers) for _, _, numbers in missing(job, open_corpus(job.corpus)))


def devices(group: Group, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the results cost: hours of GPUs, or of CPUs where there are none."""
    seconds = sum(result["seconds"] for result in results)
    kind = "gpu" if group.gpus else "cpu"
    count = group.workers * (group.gpus or group.cpus)
    return {"device": kind, "device_hours": seconds * count / 3600}


def reset(context: Context) -> None:
    """Nothing: records are content, and what is there stands."""


def remark(outputs: dict[str, Any]) -> str:
    """Sequences that were added to the cache."""
    return f"{outputs['metrics'].get('sequences', 0)} sequences added"
