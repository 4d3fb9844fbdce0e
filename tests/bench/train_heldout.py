"""What students learn: cross-entropy, cached `sample`, cached `topk`, online; same steps, 3 seeds.

    make demo && python -m tests.bench.train --only heldout

The demo's teacher, corpus and student. The held-out loss is the cross-entropy on `select`, in nats
per token; the weights are the last ones, so nothing was chosen on it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.storage import open_store
from tests.fixtures.ranks import Ranks

SEEDS = (11, 12, 13)
# name: mode, losses, cache
WAYS: dict[str, tuple[str, dict[str, float], dict[str, Any]]] = {
    "ce": ("cached", {"ce": 1.0}, {}),
    "cached_sample": ("cached", {"forward_kl": 1.0}, {"method": "sample", "draws": 50}),
    "cached_topk": ("cached", {"forward_kl": 1.0}, {"method": "topk", "k": 64}),
    "online": ("online", {"forward_kl": 1.0}, {"method": "topk", "k": 64}),
}


def demo_spec(cache: dict[str, Any], storage: Path) -> Any:
    """The demo's recipe with another cache, everything resolved."""
    from jobs.spec.load import load_spec
    from trainer.resolve_auto import resolve

    spec = load_spec("demo", [])
    from trainer.spec.sections import CacheSpec

    return resolve(spec.model_copy(update={"cache": CacheSpec(**cache), "storage": str(storage)}))


def corpus_of_demo() -> Any:
    """The corpus that `make demo` has made."""
    runs = open_store("./runs")
    names = sorted(runs.sub("demo", "state").list(""))
    name = next(item for item in reversed(names) if item.startswith("prepare-"))
    outputs = runs.sub("demo", "state").read_json(name)["outputs"]
    return runs.sub("_corpora", outputs["corpus"])


def capture_main(root: str) -> None:
    """A process: captures what the trainings will read, once for each cache."""
    from tests.fixtures.ranks import start
    from trainer.run_task import run_task
    from trainer.tasks import make_capture

    worker = start()
    for cache in ({"method": "sample", "draws": 50}, {"method": "topk", "k": 64}):
        spec = demo_spec(cache, Path(root))
        store = cache_store(root, cache)
        # Every seed reads other sequences first; all of the part are captured.
        spec = spec.model_copy(
            update={"data": spec.data.model_copy(update={"max_tokens": 1 << 40})}
        )
        task = make_capture(spec, corpus_of_demo(), store, batch_tokens=4096, shard_seconds=1e9)
        run_task(task, worker)


def cache_store(root: str, cache: dict[str, Any]) -> Any:
    """The cache of these settings."""
    from trainer.logits.store import open_cache

    return open_cache(open_store(root).sub("caches"), {"bench": cache})


def train_main(root: str, way: str, seed: int) -> float:
    """A process: one training; returns its held-out loss."""
    from tests.fixtures.ranks import start
    from trainer.run_task import run_task
    from trainer.training.job import Training

    mode, losses, cache = WAYS[way]
    spec = demo_spec(cache or {"method": "topk", "k": 64}, Path(root))
    distill = spec.distill.model_validate(
        {**spec.distill.model_dump(), "mode": mode, "losses": losses, "evaluate_steps": None}
    )
    folder = open_store(root).sub(way, str(seed))
    has_teacher = way != "ce"
    job = Training(
        stage="distill",
        teacher=spec.teacher if has_teacher else None,
        student=spec.student,
        distill=replace_control(distill),
        data=spec.data.model_copy(update={"max_tokens": 1 << 40}),
        cache_spec=spec.cache,
        seed=seed,
        corpus=corpus_of_demo(),
        cache=cache_store(root, cache) if has_teacher else None,
        checkpoints=folder.sub("checkpoints"),
        output=folder.sub("student"),
        last=folder.sub("student-last"),
    )
    return float(run_task(job, start())["select_ce"])


def replace_control(distill: Any) -> Any:
    """Without checkpoints on the way."""
    return distill.model_copy(update={"control": False, "checkpoint_minutes": 1e6})


def measure(say: Callable[[str], None] = print) -> dict[str, Any]:
    """Held-out losses by way, one per seed; two processes at a time, one thread each."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as root:
        say("caches of the demo's teacher")
        Ranks(capture_main, root, world=1).results(timeout=3600)

        def one(item: tuple[str, int]) -> tuple[str, int, float]:
            way, seed = item
            loss = Ranks(train_main, root, way, seed, world=1).results(timeout=3600)[0]
            say(f"{way}, seed {seed}: {loss:.4f}")
            return way, seed, loss

        # The slow ones first, so that both processes end together.
        items = [(way, seed) for way in reversed(WAYS) for seed in SEEDS]
        with ThreadPoolExecutor(2) as pool:
            found = {(way, seed): loss for way, seed, loss in pool.map(one, items)}
    heldout = {way: [round(found[way, seed], 4) for seed in SEEDS] for way in WAYS}
    means = {way: statistics.mean(losses) for way, losses in heldout.items()}
    return {
        "heldout": heldout,
        "heldout_mean": {way: round(mean, 4) for way, mean in means.items()},
        "sample_over_online": round(means["cached_sample"] - means["online"], 4),
        "sample_over_ce": round(means["cached_sample"] - means["ce"], 4),
    }
