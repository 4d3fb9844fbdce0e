"""capture: the teacher's distributions of all sequences that will be read go to the logit cache."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.storage import Store, open_store
from jobs.run.context import Context
from jobs.run.inputs import Outputs, capture_of
from jobs.spec.job import JobSpec
from jobs.stages.worker_group import run_ranks

if TYPE_CHECKING:
    from cluster.workers import Group
    from trainer.teacher.job import Capture


def run(context: Context) -> dict[str, Any]:
    """Adds what the cache lacks; returns the cache's name and the capture's metrics."""
    from cluster.storage.keys import fingerprint
    from trainer.logits.store import open_cache

    spec = context.spec
    identity = context.inputs.identities.cache
    name = fingerprint(identity)
    cache = open_cache(context.shared.sub("_logits"), identity)
    job = _capture(spec, context.corpus, cache, context.outputs)
    if not _lacking(job):  # no need to load the teacher
        return {"cache": name, "metrics": {"sequences": 0}}
    results, group = run_ranks(context, "capture", [job], spec.resources.capture)
    return {"cache": name, "metrics": {**results[0], **devices(group, results)}}


def count_lacking(spec: JobSpec, outputs: Outputs) -> int:
    """Records that the cache lacks of those that will be read; `outputs`: of the stages done.

    Raises ValueError, one line, for a cache that is damaged.
    """
    shared = open_store(spec.storage)
    corpus = shared.sub("_corpora", outputs["prepare"]["corpus"])
    cache = shared.sub("_logits", outputs["capture"]["cache"])
    return _lacking(_capture(spec, corpus, cache, outputs))


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
