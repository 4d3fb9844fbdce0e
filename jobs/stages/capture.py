"""capture: the teacher's distributions of all sequences that will be read go to the logit cache."""

from __future__ import annotations

from typing import Any

from jobs.stages.base import Context
from jobs.stages.ranks import run_ranks


def run(context: Context) -> dict[str, Any]:
    """Adds what the cache lacks; returns the cache's name and the capture's metrics."""
    from trainer.corpus.corpus import open_corpus
    from trainer.fingerprint import fingerprint
    from trainer.job import make_capture
    from trainer.logits.store import open_cache
    from trainer.teacher import missing

    spec = context.spec
    identity = context.inputs.identities.cache
    name = fingerprint(identity)
    cache = open_cache(context.shared.sub("_logits"), identity)
    asked = spec.resources.capture
    job = make_capture(
        spec,
        context.corpus,
        cache,
        batch_tokens=asked.batch_tokens,
        shard_seconds=asked.shard_seconds,
    )
    absent = sum(len(numbers) for _, _, numbers in missing(job, open_corpus(context.corpus)))
    if not absent:  # no need to load the teacher
        return {"cache": name, "metrics": {"sequences": 0}}
    results, group = run_ranks(context, "capture", [job], asked)
    return {"cache": name, "metrics": {**results[0], **devices(group, results)}}


def devices(group: Any, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the results cost: hours of GPUs, or of CPUs where there are none."""
    seconds = sum(result["seconds"] for result in results)
    kind = "gpu" if group.gpus else "cpu"
    count = group.workers * (group.gpus or group.cpus)
    return {"device": kind, "device_hours": seconds * count / 3600}
