"""Runs the tasks of a sweep: what is missing, as soon as what it needs is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.fanout import Failure, FanOut, Progress
from cluster.resources import ResourceRequest
from cluster.storage.keys import fingerprint
from jobs.run.context import Context
from jobs.run.waiting import tasks_wait
from jobs.sweep import fingerprints
from jobs.sweep.allocation import Allocations, Item
from jobs.sweep.fingerprints import cell_fingerprint, extra_fingerprint, model_fingerprint
from jobs.sweep.progress import Running
from jobs.sweep.resources import CellRequests
from jobs.sweep.shared import SharedContext, Source, sources_of
from jobs.sweep.speed_pass import measure_speeds
from jobs.sweep.tasks import call, cell_task, extra_task, made_path, model_task, teacher_task
from quant.grid import Cell, grid, main_model
from trainer.stage_inputs import learnt_data


class Sweep:
    """One attempt of the stage: what is there, what is asked for, what came out."""

    def __init__(self, context: Context) -> None:
        self.context = context
        spec = context.spec
        assert spec.sweep is not None
        self.spec, self.sweep = spec, spec.sweep
        self.sources = sources_of(context)
        self.needs = CellRequests.of(context, self.sources)
        self.shared_context = SharedContext(
            sweep=spec.sweep,
            corpus=context.corpus,
            cache=context.cache,
            attempt=context.attempt,
            vocab=context.outputs["prepare"]["vocab_size"],
            threads=self.needs.cpus,
            speed_threads=max(1, min(cpus for cpus, _ in context.cluster.nodes)),
            gpus=self.needs.gpus,
            seed=spec.seed,
            data=learnt_data(spec),
            distill=spec.distill,
            cache_spec=spec.cache if context.cache is not None else None,
        )
        self.cells: dict[str, Cell] = {cell.key: cell for cell in grid(spec.sweep)}
        self.results: dict[str, dict[str, Any]] = {}
        self.failed_models: dict[str, str] = {}
        self.timing: dict[str, float] = {}
        main = main_model(spec.sweep)
        self.allocations = Allocations(
            spec.sweep, self.shared_context, self.sources[main], self.needs, context.outputs
        )
        self.pool: Any = None
        self.running = Running()

    # What is there already.

    def fingerprint_of(self, cell: Cell) -> str:
        """The fingerprint of a cell."""
        identity = self.sources[cell.model].identity
        return cell_fingerprint(cell, self.spec, identity, self.context.outputs)

    def finished(self, path: str, own_fingerprint: str) -> dict[str, Any] | None:
        """A published result, if it is done and of this fingerprint."""
        store = self.context.run.store
        if self.context.forced or not store.exists(path):
            return None
        result = store.read_json(path)
        done = result.get("status", "done") == "done"
        fits = done and result.get("fingerprint") == own_fingerprint
        return result if fits else None

    def _stands(self, cell: Cell) -> bool:
        """Whether a cell has a result that stands; it is taken over then."""
        found = self.finished(f"cells/{cell.key}/result.json", self.fingerprint_of(cell))
        if found is None or not fingerprints.complete(
            self.sweep, found, self.context.run.store, cell.key
        ):
            return False
        self.results[cell.key] = found
        return True

    def _forget_made(self) -> None:
        """Models of cells without a result: asked for again, they are made again."""
        store = self.context.run.store
        for path in store.glob(made_path("*")):
            self.context.attempt.fence()
            store.delete(path)

    # Evaluation: everything at once, each as soon as what it needs is there.

    def evaluate(self) -> None:
        """All cells that have no result yet, and the models beside them, as tasks."""
        context = self.context
        self.pool = FanOut(
            call,
            need=self.needs.task(),
            retries=self.spec.resources.max_failures,
            limit_s=self.needs.limit_s,
            should_stop=context.stop.is_set,
            on_start=self._started,
            on_retry=self._retried,
            on_wait=tasks_wait(context, "sweep"),
            on_progress=self._progressed,
        )
        if context.forced:
            self._forget_made()
        for cell in [] if context.forced else self.allocations.known():
            self.cells.setdefault(cell.key, cell)
        to_run = [cell for cell in self.cells.values() if not self._stands(cell)]
        again = fingerprints.missing(self.sweep, self.results, context.run.store)
        to_run += [self.cells[key] for key in again]
        for key in again:
            del self.results[key]
        allocating = self.allocations.first(anew=context.forced)
        loaded: set[str] = {cell.model for cell in to_run}
        loaded |= {main_model(self.sweep)} if allocating else set()
        loaded |= {"student"} if self._extra_to_run() else set()
        self._models(loaded)
        for cell in to_run:
            self._add(cell)
        for item in allocating:
            self._allocate(item)
        self._take_failures()
        self._count()
        for key, result in self.pool:
            self._ended(key, result)
        self.timing = {
            "evaluate_s": self.pool.makespan_s(),
            "busy_s": self.pool.busy_s(),
        }

    def _models(self, references: set[str]) -> None:
        """The unquantized models that are not evaluated yet, and references that cells need."""
        outputs, store = self.context.outputs, self.context.run.store
        for role, source in self.sources.items():
            own_fingerprint = model_fingerprint(role, self.spec, source.identity, outputs)
            done = self.finished(f"evaluations/{role}.json", own_fingerprint) is not None
            stored = all(
                store.exists(f"{source.references}/{part}/meta.json")
                for part in ("select", "report")
            )
            loads = role in references or (role == "teacher" and self.sweep.tasks)
            if role in references and not (done and stored):
                need = self.needs.reference(source)
                arguments = (source, own_fingerprint, True)
                self._add_task(f"model/{role}", model_task, arguments, source, need=need)
            elif done:
                continue
            elif role == "teacher" and not loads:
                assert self.spec.teacher is not None
                named = (source.name, self.spec.teacher, own_fingerprint)
                self._add_task(f"model/{role}", teacher_task, named)
            else:
                self._add_task(f"model/{role}", model_task, (source, own_fingerprint), source)
        for extra, own_fingerprint in self._extra_to_run():
            student = self.sources["student"]
            after = self._reference("student")
            key = f"extra/{extra.label}"
            self._add_task(key, extra_task, (extra, student, own_fingerprint), student, after)

    def _extra_to_run(self) -> list[tuple[Any, str]]:
        """Models quantized elsewhere that are not evaluated yet, with their fingerprints."""
        student = self.sources["student"].identity
        found = []
        for extra in self.sweep.extra:
            own_fingerprint = extra_fingerprint(extra, self.spec, student, self.context.outputs)
            if self.finished(f"evaluations/extra-{extra.label}.json", own_fingerprint) is None:
                found.append((extra, own_fingerprint))
        return found

    def _reference(self, role: str) -> tuple[str, ...]:
        """What has to end before cells of a model can start."""
        key = f"model/{role}"
        return (key,) if key in self.pool else ()

    def _add(self, cell: Cell) -> None:
        self.cells[cell.key] = cell
        source = self.sources[cell.model]
        key = f"cell/{cell.key}"
        self.running.added(key, self.needs.cost(cell, source))
        self.pool.add(
            key,
            cell_task,
            (
                self.shared_context,
                cell,
                self.fingerprint_of(cell),
                source,
                self.needs.forecast(cell, source),
            ),
            need=self.needs.cell(cell, source),
            after=self._reference(cell.model),
            priority=self.needs.cost(cell, source),
        )

    def _add_task(
        self,
        key: str,
        task: object,
        arguments: tuple[Any, ...],
        loads: Source | None = None,
        after: Sequence[str] = (),
        need: ResourceRequest | None = None,
    ) -> None:
        """A task beside the cells; loads: the 16-bit model that it takes the memory of."""
        need = need or (self.needs.task() if loads is None else self.needs.model(loads))
        self.running.added(key, 0.0 if loads is None else self.needs.model_cost(loads))
        self.pool.add(
            key,
            task,
            (replace(self.shared_context, threads=int(need.cpus)), *arguments),
            need=need,
            after=after,
            priority=float("inf"),
        )

    def _allocate(self, item: Item) -> None:
        """A task that an allocation asks for."""
        key, task, arguments = item
        main = main_model(self.sweep)
        self._add_task(key, task, arguments, self.sources[main], self._reference(main))

    def _ended(self, key: str, result: Any) -> None:  # noqa: ANN401
        self.running.ended(key)
        kind, _, name = key.partition("/")
        failed = isinstance(result, Failure)
        if failed:
            print(result.detail)  # to the log
        if kind == "cell":
            self._cell_ended(name, result)
        elif kind == "model" and failed:
            self._model_failed(name, result)
        elif kind == "extra" and failed:
            self._extra_failed(name, result)
        elif kind == "allocate":
            more, cells = self.allocations.ended(name, result)
            for item in more:
                self._allocate(item)
            for cell in cells:
                if cell.key not in self.cells and not self._stands(cell):
                    self._add(cell)
                self.cells.setdefault(cell.key, cell)
            self._take_failures()
        self._count()

    def _cell_ended(self, key: str, result: Any) -> None:  # noqa: ANN401
        if isinstance(result, Failure):
            result = self._failed(self.cells[key], result)
        self.results[key] = result
        self.context.emit(
            "cell_done", stage="sweep", key=key, status=result["status"], error=result["error"]
        )

    def _failed(self, cell: Cell, failure: Failure) -> dict[str, Any]:
        from quant.evaluation.cell import failed_cell

        result = {
            **failed_cell(cell, failure.error),
            "failure": failure.kind,
            "fingerprint": self.fingerprint_of(cell),
        }
        self.context.attempt.write_json(f"cells/{cell.key}/result.json", result)
        return result

    def _take_failures(self) -> None:
        """Allocated cells that there will not be, as recorded results."""
        for key, error in self.allocations.take_failures():
            self.cells[key] = self.allocations.empty_cell(key)
            self._cell_ended(key, Failure(error, error, "error"))

    def _model_failed(self, role: str, failure: Failure) -> None:
        """Without the student there is nothing to compare; of the others what can be had is had."""
        if role == "student":
            raise RuntimeError(f"evaluating the {role}: {failure.error}")
        self.failed_models[role] = failure.error
        self.context.reporter.say(f"sweep: the {role} failed: {failure.error}")
        if role == "teacher":  # its records are there, whatever its size
            assert self.spec.teacher is not None
            source = self.sources[role]
            named = (source.name, self.spec.teacher, "")
            self._add_task("model/teacher-records", teacher_task, named)

    def _extra_failed(self, name: str, failure: Failure) -> None:
        from quant.evaluation.baselines import failed_extra

        path = f"evaluations/extra-{name}.json"
        self.context.attempt.write_json(path, failed_extra(name, failure.error))
        self.failed_models[f"extra-{name}"] = failure.error
        self.context.reporter.say(f"sweep: {name} failed: {failure.error}")

    def _started(self, key: str, where: str) -> None:
        kind, _, name = key.partition("/")
        if kind == "cell":
            self.context.emit("cell_start", stage="sweep", key=name, where=where)
        self.running.heard(key, Progress(0.0, "starting"))
        self._count()

    def _progressed(self, key: str, progress: Progress) -> None:
        self.running.heard(key, progress)
        if self.running.due():
            self._count()

    def _retried(self, key: str, why: str, attempt: int) -> None:
        self.running.lost(key)
        name = key.partition("/")[2]
        self.context.emit("cell_retry", stage="sweep", key=name, why=why, turn=attempt)
        self.context.reporter.say(f"sweep: {name} runs again (attempt {attempt}): {why}")

    def _count(self) -> None:
        total = len(self.cells) + self.allocations.to_come()
        done = len(self.results)
        failed = sum(result["status"] != "done" for result in self.results.values())
        self.context.emit(
            "progress",
            stage="sweep",
            done=done,
            total=total,
            unit="cells",
            failed=failed,
            share=round(self.running.share(), 4),
            tasks=self.running.tasks(),
        )

    def measure(self) -> None:
        """Speeds of the cells that have none: the exclusive pass."""
        models = {key: cell.model for key, cell in self.cells.items()}
        measure_speeds(
            self.context, self.shared_context, self.needs, self.sources, models, self.results
        )
        self.context.reporter.end_stage("speed")

    # The end.

    def tidy(self) -> None:
        """Models that are not to be kept go; so do references, unless something failed."""
        fingerprints.drop(self.sweep, self.results, self.context.attempt)
        if not self._all_failed():
            self.context.attempt.fence()
            store = self.context.run.store
            if store.exists("references"):
                store.delete("references", recursive=True)

    def _all_failed(self) -> list[str]:
        cells = [key for key, result in self.results.items() if result["status"] != "done"]
        return sorted([*cells, *self.failed_models])

    def outputs(self, seconds: float) -> dict[str, Any]:
        """Which cells there are, and a fingerprint of their results."""
        failed = self._all_failed()
        busy = self.timing.get("busy_s", 0.0)
        slots = self.needs.slots
        return {
            "cells": {key: fingerprint(self.results[key]) for key in sorted(self.results)},
            "metrics": {
                "cells": len(self.results),
                "failed": len(failed),
                "seconds": seconds,
                "device": "gpu" if self.needs.gpus else "cpu",
                "device_hours": busy * (self.needs.gpus or self.needs.cpus) / 3600,
                **self.timing,
                "slots": slots,
            },
            "failed": failed,
        }
