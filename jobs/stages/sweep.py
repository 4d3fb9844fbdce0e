"""sweep: every cell of the grid quantized and evaluated, then its speed measured alone."""

from __future__ import annotations

import time
from typing import Any

from cluster.fanout import Cancelled, Failure, fan_out
from cluster.session import Cluster
from cluster.spec import CellResources
from cluster.storage import Store
from jobs.errors import Interrupted, SpecErrors
from jobs.inputs import EVALUATION, Outputs
from jobs.stages.base import Context
from jobs.stages.evaluation import Material, cell_task, model_task, speed_task, teacher_task
from quant.spec import QuantSpec, SweepSpec
from trainer.fingerprint import fingerprint


def run(context: Context) -> dict[str, Any]:
    """Runs what is missing or failed; a failing cell is a recorded result, the others go on."""
    began = time.time()
    sweep = _Sweep(context)
    try:
        sweep.evaluate()
        sweep.measure()
    except Cancelled:
        raise Interrupted("sweep stopped; finished cells are kept") from None
    outputs = sweep.outputs()
    seconds = time.time() - began
    outputs["metrics"] = {
        "cells": len(sweep.cells),
        "failed": sum(result["status"] != "done" for result in sweep.results.values()),
        "seconds": seconds,
        "device": "gpu" if sweep.gpus else "cpu",
        "device_hours": sweep.busy_s * (sweep.gpus or sweep.cpus) / 3600,
    }
    outputs["failed"] = sorted(k for k, r in sweep.results.items() if r["status"] != "done")
    return outputs


def cell_resources(asked: CellResources, cluster: Cluster) -> tuple[int, float]:
    """CPUs and GPUs of one cell, `auto` resolved. Raises SpecErrors if none could ever start."""
    cpus = 1 if asked.cpus_per_cell == "auto" else asked.cpus_per_cell
    gpus: float = 1 if cluster.gpus else 0
    if asked.gpus_per_cell != "auto":
        gpus = asked.gpus_per_cell
    if not cluster.room(cpus, gpus):
        there = ", ".join(f"{c} CPUs and {g} GPUs" for c, g in cluster.nodes)
        raise SpecErrors(
            [
                f"resources.sweep: a cell of {cpus} CPUs and {gpus} GPUs fits no node ({there}); "
                "set cpus_per_cell or gpus_per_cell lower"
            ]
        )
    return cpus, gpus


def cell_fingerprint(
    cell: QuantSpec, sweep: SweepSpec, student: dict[str, Any], outputs: Outputs
) -> str:
    """What a cell's result depends on; `student`: the identity of one that is not trained here."""
    kept = sorted(set(sweep.keep_16bit))
    return fingerprint(
        {
            "evaluation": EVALUATION,
            "cell": cell.to_dict(),
            "model": outputs.get("distill", {}).get("student") or student,
            "corpus": outputs["prepare"]["corpus"],
            "cache": outputs.get("capture", {}).get("cache"),
            "batch_sequences": sweep.batch_sequences,
            **({"keep_16bit": kept} if kept else {}),  # cells from before the key stand
        }
    )


class _Sweep:
    def __init__(self, context: Context) -> None:
        self.context = context
        spec = context.spec
        assert spec.sweep is not None
        self.cells = {cell.key: cell for cell in spec.sweep.cells()}
        self.cpus, self.gpus = cell_resources(spec.resources.sweep, context.cluster)
        self.material = Material(
            sweep=spec.sweep,
            corpus=context.corpus,
            cache=context.cache,
            attempt=context.attempt,
            vocab=context.outputs["prepare"]["vocab_size"],
            threads=self.cpus,
            speed_threads=max(1, min(cpus for cpus, _ in context.cluster.nodes)),
            gpus=self.gpus,
        )
        self.model: Store | str
        if spec.distill is not None:
            self.model, self.revision = context.run.store.sub("student"), "main"
        else:
            assert spec.student.model is not None
            self.model, self.revision = spec.student.model, spec.student.revision
        self.results: dict[str, dict[str, Any]] = {}
        self.busy_s = 0.0  # seconds of the tasks of this attempt

    def finished(self, key: str, print_: str) -> dict[str, Any] | None:
        """The cell's published result, if it is done and of this fingerprint."""
        store, path = self.context.run.store, f"cells/{key}/result.json"
        if not store.exists(path):
            return None
        result = store.read_json(path)
        fits = result.get("status") == "done" and result.get("fingerprint") == print_
        return result if fits else None

    def evaluate(self) -> None:
        """All cells that have no result yet, and the unquantized models, as tasks."""
        context, spec = self.context, self.context.spec
        assert spec.sweep is not None
        student = context.inputs.identities.student
        prints = {
            key: cell_fingerprint(cell, spec.sweep, student, context.outputs)
            for key, cell in self.cells.items()
        }
        for key in self.cells:
            found = None if context.forced else self.finished(key, prints[key])
            if found is not None:
                self.results[key] = found
        items: dict[str, tuple[Any, ...]] = {}
        student_name = spec.name if spec.distill is not None else label(str(spec.student.model))
        references = {"student": (model_task, self.model, student_name)}
        if "control" in context.outputs.get("distill", {}):
            control = context.run.store.sub("control")
            references["control"] = (model_task, control, f"{spec.name} (control)")
        if spec.teacher is not None:
            name = label(spec.teacher.model)
            items["teacher"] = (teacher_task, (self.material, name, spec.teacher))
        for role, (task, model, name) in references.items():
            items[role] = (task, (self.material, role, name, model, self.revision))
        for key, cell in self.cells.items():
            if key not in self.results:
                arguments = (self.material, cell, prints[key], self.model, self.revision)
                items[key] = (cell_task, arguments)
        self._count(len(self.results))
        for key, result in self._fan_out(items):
            if key not in self.cells:
                if isinstance(result, Failure):
                    raise RuntimeError(f"evaluating the {key}: {result.error}")
                continue
            if isinstance(result, Failure):
                result = self._failed(key, prints[key], result)
            self.results[key] = result
            self.busy_s += (result.get("quantize_s") or 0) + (result.get("eval_s") or 0)
            context.emit(
                "cell_done", stage="sweep", key=key, status=result["status"], error=result["error"]
            )
            self._count(len(self.results))

    def _fan_out(self, items: dict[str, tuple[Any, ...]]) -> Any:
        context = self.context
        return fan_out(
            _call,
            items,
            cpus=self.cpus,
            gpus=self.gpus,
            retries=context.spec.resources.max_failures,
            should_stop=context.stop.is_set,
            on_start=lambda key: self._started(key),
        )

    def _started(self, key: str) -> None:
        if key in self.cells:
            self.context.emit("cell_start", stage="sweep", key=key)

    def _count(self, done: int) -> None:
        self.context.emit("progress", stage="sweep", done=done, total=len(self.cells), unit="cells")

    def _failed(self, key: str, print_: str, failure: Failure) -> dict[str, Any]:
        from quant.cell import failed_cell

        result = {**failed_cell(self.cells[key], failure.error), "fingerprint": print_}
        self.context.attempt.write_json(f"cells/{key}/result.json", result)
        print(failure.detail)  # to the log
        return result

    def measure(self) -> None:
        """Speeds of the cells that have none, one at a time, beside nothing else of this job."""
        context = self.context
        todo = {
            key: (self.material, self.cells[key], self.model, self.revision)
            for key, result in self.results.items()
            if result["status"] == "done" and result.get("decode_tokens_per_s") is None
        }
        done = 0
        for key, speeds in fan_out(
            speed_task,
            todo,
            cpus=self.cpus,
            gpus=self.gpus,
            in_flight=1,
            should_stop=context.stop.is_set,
        ):
            if isinstance(speeds, Failure):
                context.reporter.say(f"sweep: no speed of {key}: {speeds.error}")
                context.emit("speed_failed", stage="sweep", key=key, error=speeds.error)
                print(speeds.detail)
                continue
            self.results[key] = {**self.results[key], **speeds}
            done += 1
            context.emit("progress", stage="speed", done=done, total=len(todo), unit="cells")
        self._baseline()

    def _baseline(self) -> None:
        """The 16-bit model's own speed, measured beside the cells, goes to its evaluation."""
        store = self.context.run.store
        measured = [
            result for result in self.results.values() if result.get("baseline_decode_tokens_per_s")
        ]
        if not measured:
            return
        path = "evaluations/student.json"
        names = ("decode_tokens_per_s", "prefill_tokens_per_s", "resident_bytes")
        middle = sorted(measured, key=lambda item: item["baseline_decode_tokens_per_s"])
        speeds = {name: middle[len(middle) // 2].get(f"baseline_{name}") for name in names}
        self.context.attempt.write_json(path, {**store.read_json(path), **speeds})

    def outputs(self) -> dict[str, Any]:
        """Which cells there are, and a fingerprint of their results."""
        return {"cells": {key: fingerprint(self.results[key]) for key in sorted(self.results)}}


def label(model: str) -> str:
    """How a table calls a model: a hub id as it is, a folder by its last telling name."""
    parts = [part for part in model.replace("\\", "/").split("/") if part]
    if not model.startswith("/") and "://" not in model:
        return model
    return parts[-2] if len(parts) > 1 and parts[-1] in ("student", "control") else parts[-1]


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)
