"""The exclusive pass: speed, memory and energy, one cell at a time on a machine, alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.fanout import Failure, FanOut
from jobs.cells.material import Material, Source
from jobs.cells.needs import Needs
from jobs.cells.work import call, speed_task
from jobs.stages.base import Context
from jobs.stages.placement import tasks_wait

# What of the 16-bit model is measured beside its cells.
BASELINE = (
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "resident_bytes",
    "peak_memory_bytes",
    "energy_per_token_j",
)


def measure_speeds(
    context: Context,
    material: Material,
    needs: Needs,
    sources: Mapping[str, Source],
    models: Mapping[str, str],
    results: dict[str, dict[str, Any]],
) -> None:
    """Adds speeds to the results of finished cells that have none, here and on storage.

    models: by cell, the role of the 16-bit model that it is made of. A cell whose speed cannot be
    had stays without; the next run tries again. Speeds of GPUs of another type, from a cluster that
    the run was on before, are measured again where all others are.
    """
    speeds_of = {r.get("gpu_type") or "" for r in results.values() if _has_speed(r)}
    need, machines = needs.exclusive(speeds_of)
    todo = [
        key
        for key, result in results.items()
        if result["status"] == "done"
        and result.get("model_kept")
        and (not _has_speed(result) or (result.get("gpu_type") or "") != need.gpu_type)
    ]
    pool = FanOut(
        call,
        need=need,
        in_flight=machines,
        limit_s=needs.limit_s,
        should_stop=context.stop.is_set,
        on_wait=tasks_wait(context, "sweep"),
    )
    for key in todo:
        pool.add(key, speed_task, (material, key, sources[models[key]], need.gpu_type))
    done = 0
    for key, speeds in pool:
        if isinstance(speeds, Failure):
            context.reporter.say(f"sweep: no speed of {key}: {speeds.error}")
            context.emit("speed_failed", stage="sweep", key=key, error=speeds.error)
            print(speeds.detail)
            continue
        results[key] = {**results[key], **speeds}
        done += 1
        context.emit("progress", stage="speed", done=done, total=len(todo), unit="cells")
    for role in dict.fromkeys(models.values()):
        _baseline(context, role, [results[key] for key in results if models[key] == role])


def _has_speed(result: Mapping[str, Any]) -> bool:
    return result.get("decode_tokens_per_s") is not None


def _baseline(context: Context, role: str, cells: list[dict[str, Any]]) -> None:
    """The 16-bit model's own speed, the median beside its cells, goes to its evaluation."""
    measured = [cell for cell in cells if cell.get("baseline_decode_tokens_per_s")]
    if not measured:
        return
    path = f"evaluations/{role}.json"
    measured.sort(key=lambda cell: cell["baseline_decode_tokens_per_s"])
    chosen = measured[len(measured) // 2]
    speeds = {name: chosen.get(f"baseline_{name}") for name in BASELINE}
    speeds["device_name"] = chosen.get("device_name")
    store = context.run.store
    context.attempt.write_json(path, {**store.read_json(path), **speeds})
