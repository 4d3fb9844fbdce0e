"""capture: the teacher's distributions of all sequences that will be read go to the logit cache."""

from __future__ import annotations

from typing import Any

from jobs.stages.base import Context
from jobs.stages.ranks import run_ranks


def run(context: Context) -> dict[str, Any]:
    """Adds what the cache lacks; returns the cache's name and the capture's metrics."""
    from trainer.corpus.corpus import open_corpus
    from trainer.identity import fingerprint
    from trainer.logits.store import open_cache
    from trainer.teacher import Capture, missing

    spec = context.spec
    assert spec.data is not None and spec.teacher is not None
    identity = context.inputs.identities.cache
    name = fingerprint(identity)
    cache = open_cache(context.shared.sub("_logits"), identity)
    job = Capture(
        teacher=spec.teacher,
        cache_spec=spec.cache,
        data=spec.data,
        distill=spec.distill,
        seed=spec.seed,
        batch_tokens=spec.resources.capture.batch_tokens,
        shard_seconds=spec.resources.capture.shard_seconds,
        corpus=context.corpus,
        cache=cache,
    )
    absent = sum(len(numbers) for _, _, numbers in missing(job, open_corpus(context.corpus)))
    if not absent:  # no need to load the teacher
        return {"cache": name, "metrics": {"sequences": 0}}
    results, group = run_ranks(context, "capture", [job], spec.resources.capture)
    return {"cache": name, "metrics": {**results[0], **devices(group, results)}}


def devices(group: Any, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the results cost: hours of GPUs, or of CPUs where there are none."""
    seconds = sum(result["seconds"] for result in results)
    kind = "gpu" if group.gpus else "cpu"
    count = group.workers * (group.gpus or group.cpus)
    return {"device": kind, "device_hours": seconds * count / 3600}
