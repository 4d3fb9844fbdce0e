"""Which cells keep their models: all, those on the Pareto front, or none."""

from __future__ import annotations

from typing import Any

from cluster.storage import Attempt, Store
from jobs.report.front import front_keys
from quant.spec import SweepSpec


def complete(sweep: SweepSpec, result: dict[str, Any], store: Store, key: str) -> bool:
    """Whether a finished cell has all that is asked for: its speed, and its model if it is kept.

    Of a model that went because it was not on the front it is not known what the front is now: it
    stands, and `missing` finds those that are.
    """
    there = store.exists(f"cells/{key}/model/config.json")
    if there:
        return True
    measured = result.get("decode_tokens_per_s") is not None
    return measured and sweep.keep_models != "all"


def missing(sweep: SweepSpec, results: dict[str, dict[str, Any]], store: Store) -> list[str]:
    """Cells on the front whose models an earlier sweep did not keep."""
    if sweep.keep_models != "pareto":
        return []
    return [
        key
        for key in sorted(front_keys(results))
        if not store.exists(f"cells/{key}/model/config.json")
    ]


def drop(sweep: SweepSpec, results: dict[str, dict[str, Any]], attempt: Attempt) -> list[str]:
    """Deletes the models that are not kept, of cells that are measured; returns their keys."""
    if sweep.keep_models == "all":
        return []
    kept = front_keys(results) if sweep.keep_models == "pareto" else set()
    dropped = []
    for key, result in results.items():
        place = f"cells/{key}/model"
        done = result["status"] == "done" and result.get("decode_tokens_per_s") is not None
        if not done or key in kept or not attempt.store.exists(place):
            continue
        attempt.fence()
        attempt.store.delete(place, recursive=True)
        results[key] = {**result, "model_kept": False}
        attempt.write_json(f"cells/{key}/result.json", results[key])
        dropped.append(key)
    return dropped
