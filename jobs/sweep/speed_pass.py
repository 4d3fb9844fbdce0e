"""The exclusive pass: speed, memory and energy, one cell at a time on a machine, alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.fanout import Failure, FanOut, Progress
from cluster.resources import ResourceRequest
from jobs.run.context import Context
from jobs.run.waiting import tasks_wait
from jobs.sweep.progress import NAMED, Running
from jobs.sweep.resources import CellRequests
from jobs.sweep.shared import SharedContext, Source
from jobs.sweep.tasks import call, has_speed, speed_task

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
    shared_context: SharedContext,
    needs: CellRequests,
    sources: Mapping[str, Source],
    models: Mapping[str, str],
    results: dict[str, dict[str, Any]],
) -> None:
    """Adds speeds to the results of finished cells that have none, here and on storage.

    One task takes all cells of a 16-bit model in turn, on several machines each its part of them,
    so that the model is loaded once. models: by cell, the role of that model. A cell whose speed
    cannot be had stays without; the next run tries again. Speeds of GPUs of another type, from a
    cluster that the run was on before, are measured again where all others are.
    """
    speeds_of = {r.get("gpu_type") or "" for r in results.values() if _measured(r)}
    need, machines = needs.exclusive(speeds_of)
    to_run: dict[str, list[str]] = {}
    for key, result in results.items():
        there = result["status"] == "done" and result.get("model_kept")
        if there and not has_speed(result, need.gpu_type):
            to_run.setdefault(models[key], []).append(key)
    speeds = _Speeds(context, shared_context, needs, need, machines, results)
    for role, keys in to_run.items():
        for part in range(machines):
            speeds.add(sources[role], keys[part::machines])
    speeds.run()
    for role in dict.fromkeys(models.values()):
        _baseline(context, role, [results[key] for key in results if models[key] == role])


class _Speeds:
    """The tasks of the pass, and what came of them."""

    def __init__(
        self,
        context: Context,
        shared_context: SharedContext,
        needs: CellRequests,
        need: ResourceRequest,
        machines: int,
        results: dict[str, dict[str, Any]],
    ) -> None:
        self.context, self.shared_context, self.results = context, shared_context, results
        self.limit_s, self.gpu_type = needs.limit_s, need.gpu_type
        self.tasks: dict[str, tuple[Source, list[str]]] = {}
        self.at: dict[str, int] = {}  # by task: how many of its cells are behind it
        self.now: dict[str, Progress] = {}  # of tasks that run; their words are the cell's key
        self.running = Running()
        self.ended = self.total = 0
        self.pool = FanOut(
            call,
            need=need,
            max_running=machines,
            should_stop=context.stop.is_set,
            on_wait=tasks_wait(context, "sweep"),
            on_progress=self._progress,
        )

    def add(self, source: Source, keys: list[str], again: bool = False) -> None:
        """A task for some cells of one model; again: what another task has left."""
        if not keys:
            return
        name = f"speed/{len(self.tasks)}"
        self.tasks[name] = (source, keys)
        self.total += 0 if again else len(keys)
        arguments = (self.shared_context, keys, source, self.gpu_type)
        self.pool.add(name, speed_task, arguments, limit_s=self.limit_s * len(keys))

    def run(self) -> None:
        """Until every cell was measured, or cannot be."""
        if self.tasks:
            self._notify()  # its process takes a while to start
        for name, outcome in self.pool:
            source, keys = self.tasks[name]
            at = self.at.pop(name, 0)
            self.now.pop(name, None)
            if not isinstance(outcome, Failure):
                self._take(keys, outcome)
                continue
            print(outcome.detail)  # to the log
            if outcome.kind == "error" or self.pool.timings[name].started is None:
                self._take(keys, dict.fromkeys(keys, outcome.error))  # of none in particular
                continue
            # Its process was lost, or ended: the cell that it was at goes without, others go on.
            self._take(keys[: at + 1], {keys[at]: outcome.error})
            self.add(source, keys[at + 1 :], again=True)

    def _take(self, keys: list[str], errors: Mapping[str, str]) -> None:
        """What a task leaves of these cells."""
        for key in keys:
            result = self.context.run.store.read_json(f"cells/{key}/result.json")
            if has_speed(result, self.gpu_type):
                self.results[key] = result
                continue
            error = errors.get(key, "its process was lost")
            self.context.reporter.say(f"sweep: no speed of {key}: {error}")
            self.context.emit("speed_failed", stage="sweep", key=key, error=error)
        self.ended += len(keys)
        self._notify()

    def _progress(self, name: str, progress: Progress) -> None:
        before = self.at.get(name, 0)
        self.at[name] = int(progress.done * len(self.tasks[name][1]) + 1e-6)
        self.now[name] = progress
        if self.at[name] != before or self.running.due():
            self._notify()

    def _notify(self) -> None:
        done = self.ended + sum(self.at.values())
        shares = {name: now.done * len(self.tasks[name][1]) for name, now in self.now.items()}
        self.context.emit(
            "progress",
            stage="speed",
            done=done,
            total=self.total,
            unit="cells",
            share=min(1.0, (self.ended + sum(shares.values())) / max(1, self.total)),
            tasks=[
                {"key": now.words, "share": shares[name] % 1, "words": "speed of one cell alone"}
                for name, now in list(self.now.items())[:NAMED]
            ],
        )


def _measured(result: Mapping[str, Any]) -> bool:
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
    speeds |= {name: chosen.get(name) for name in ("baseline_dtype", "device_name")}
    store = context.run.store
    context.attempt.write_json(path, {**store.read_json(path), **speeds})
