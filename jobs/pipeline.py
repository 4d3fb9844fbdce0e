"""The pipeline: which stages a run needs, which are done, and running the others in order."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from cluster.session import Cluster, connect, nodes_without
from cluster.storage import EventTail, EventWriter, Fenced, open_store
from jobs import checks
from jobs.cells.given import absolute_paths
from jobs.errors import Interrupted, SpecErrors, StageFailed
from jobs.inputs import Inputs
from jobs.load import dump_spec
from jobs.progress import Reporter
from jobs.rundir import RunDir
from jobs.spec import JobSpec
from jobs.terminal import chatter_to, log_file
from jobs.todo import Plan, is_current
from trainer.job import resolve

# How long the end of a run waits for Weights & Biases.
TRACKING_SECONDS = 120.0


def run_pipeline(
    spec: JobSpec,
    *,
    address: str | None = None,
    until: str | None = None,
    only: str | None = None,
    redo: str | None = None,
) -> int:
    """Runs what is left of a job; returns 0.

    Raises SpecErrors (wrong input; before Ray starts wherever that can be known), StageFailed, or
    Interrupted after a clean stop.
    """
    faults = checks.storage_faults(spec)
    if faults:
        raise SpecErrors(faults)
    try:
        spec = absolute_paths(resolve(spec))
        run = RunDir(open_store(spec.storage).sub(spec.name))
        inputs = Inputs(spec)
        plan = Plan(spec, run, inputs, until, only, redo)
    except ValueError as error:
        raise error if isinstance(error, SpecErrors) else SpecErrors([str(error)]) from error
    faults = checks.spec_faults(spec, plan.todo)
    if faults:
        raise SpecErrors(faults)
    if not plan.todo:
        console = Console(highlight=False)
        for stage in plan.skipped:
            console.print(f"{stage}: done before, skipped", markup=False)
        show_result(console, run)
        return 0
    return _run(spec, run, inputs, plan, address)


def _run(spec: JobSpec, run: RunDir, inputs: Inputs, plan: Plan, address: str | None) -> int:
    attempt = run.claim()
    log = log_file(run.store, attempt.number)
    began = time.time()
    tracking: _Tracking | None = _Tracking(spec, run)
    with chatter_to(log) as console, EventWriter(run.store, attempt.number) as events:
        run.current().write_bytes("spec.yaml", dump_spec(spec).encode())
        values = spec.model_dump(mode="json")
        events.emit("run_start", name=spec.name, spec=values)
        status = "failed"
        try:
            with _Interruptible() as signals, Reporter(console) as reporter:
                reporter.say(f"run {run.store.url}, attempt {attempt.number}, log {log}")
                for stage in plan.skipped:
                    events.emit("stage_skip", stage=stage)
                    reporter.say(f"{stage}: done before, skipped")
                with connect(address) as cluster:
                    signals.install()  # Ray has put its own handler of SIGTERM in place
                    from jobs.stages.base import Context

                    tail = EventTail(run.store)
                    tail.poll()  # what earlier attempts said is not news
                    context = Context(
                        spec,
                        run,
                        inputs,
                        dict(plan.outputs),
                        events,
                        tail,
                        reporter,
                        cluster,
                        signals.stop,
                    )
                    refuse_unshared(spec, run, cluster)
                    for stage in plan.todo:
                        _run_stage(stage, context, log, forced=stage in plan.forced)
            status = "done"
        except Interrupted as stop_error:
            status = "interrupted"
            raise Interrupted(f"{stop_error}; continue with: {_command(spec)}") from stop_error
        except KeyboardInterrupt:
            status, tracking = "interrupted", None
            raise
        except ConnectionError as error:
            raise SpecErrors([f"--address: {error}"]) from error
        finally:
            with contextlib.suppress(Exception):  # never hide the error that ended the run
                events.emit("run_end", status=status, seconds=time.time() - began)
                events.flush()
            note = tracking.finish() if tracking is not None else ""
            if note:
                console.print(note, markup=False, soft_wrap=True)
            if status == "interrupted":
                console.print(f"log: {log}", markup=False, soft_wrap=True)
        if "summarize" in plan.todo:
            show_result(console, run)
        console.print(f"log: {log}", markup=False, soft_wrap=True)
    return 0


def _run_stage(stage: str, context: Any, log: Path, forced: bool) -> None:
    """One stage, from its start to its record; errors become the user's."""
    from importlib import import_module

    began = time.time()
    inputs = context.inputs.of(stage, context.outputs)
    record = context.run.record(stage)
    values = {"fixed": inputs.fixed, "growing": inputs.growing}
    if record is not None and is_current(record, inputs) and not forced:
        context.outputs[stage] = record.outputs
        context.events.emit("stage_skip", stage=stage)
        context.reporter.say(f"{stage}: done before, skipped")
        return
    context.emit("stage_start", stage=stage)
    if context.stop.is_set():
        raise Interrupted(f"stopped before {stage}")
    context.forced = forced
    try:
        module = import_module(f"jobs.stages.{stage}")
        if forced:
            if hasattr(module, "reset"):
                module.reset(context)
            context.run.forget(stage)
        outputs = module.run(context)
    except (Interrupted, SpecErrors):
        raise
    except Exception as error:
        traceback.print_exc()
        why = " ".join(str(error).split()) or type(error).__name__
        context.events.emit("stage_failed", stage=stage, error=why)
        if isinstance(error, Fenced):
            command = "nothing: the newer attempt goes on"
        else:
            command = _command(context.spec)
        raise StageFailed(stage, why, str(log), command) from error
    finally:
        context.reporter.end_stage(stage)
    seconds = time.time() - began
    context.outputs[stage] = outputs
    context.run.finish(stage, values, outputs, seconds)
    context.emit("stage_done", stage=stage, seconds=seconds, metrics=outputs.get("metrics", {}))
    context.reporter.say(f"{stage}: done in {seconds:.0f} s{_remark(stage, outputs)}")


def _remark(stage: str, outputs: dict[str, Any]) -> str:
    """What a stage has to say at its end."""
    metrics = outputs.get("metrics", {})
    if stage == "prepare":
        sizes = outputs["sequences"]
        return ", sequences: " + ", ".join(f"{count} {part}" for part, count in sizes.items())
    if stage == "capture":
        return f", {metrics.get('sequences', 0)} sequences added"
    if stage == "distill":
        parts = [
            f"{name} {metrics[name]['select_perplexity']:.2f}"
            for name in ("distill", "control")
            if name in metrics
        ]
        return ", perplexity on select: " + ", ".join(parts)
    if stage == "sweep":
        return f", {metrics['cells']} cells, {metrics['failed']} failed"
    return ""


def _command(spec: JobSpec) -> str:
    """The command that continues: the one that was given."""
    return " ".join(["stillhouse", *sys.argv[1:]]) if sys.argv[1:] else f"run of {spec.name}"


def refuse_unshared(spec: JobSpec, run: RunDir, cluster: Cluster) -> None:
    """Raises SpecErrors if the storage is a local folder that some node does not see."""
    folder = run.store.local("spec.yaml")
    if folder is None:
        return
    blind = nodes_without(str(folder), cluster)
    if blind:
        raise SpecErrors(
            [
                f"storage: {spec.storage} is a folder of this machine that the nodes "
                f"{', '.join(blind)} do not see; may be a shared folder or a URL such as "
                "s3://bucket/prefix"
            ]
        )


def show_result(console: Console, run: RunDir) -> None:
    """The headline table, as far as there is one, and where the page is."""
    if not run.store.exists("report/index.html"):
        return
    from jobs.report.build import show

    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(file=console.file, highlight=False, width=max(console.width, 160))
    if run.store.read_json("report/results.json")["rows"]:
        console.print(show([run.store], console.width))
    console.print(f"report: {run.store.path('report', 'index.html')}", markup=False, soft_wrap=True)


class _Tracking:
    """Weights & Biases, as a projection of what is on storage, in a process of its own.

    Online it follows the run, offline it writes once at the end. Whatever W&B does, the run goes
    on, and hears of it in one line.
    """

    def __init__(self, spec: JobSpec, run: RunDir) -> None:
        from jobs.tracking import Follower
        from jobs.tracking.mode import resolve as resolve_mode

        self._spec, self._run = spec.tracking, run
        self._follower = None
        with contextlib.suppress(ValueError):  # told at the end, by the projection itself
            if resolve_mode(self._spec.mode) == "online":
                self._follower = Follower.start(
                    run.store.url, **self._settings(), follow=True, attempt=run.current().number
                )

    def _settings(self) -> dict[str, Any]:
        return self._spec.model_dump(include={"mode", "project", "entity", "tags"})

    def finish(self) -> str:
        """Waits until everything is projected, within a time limit; returns what to tell."""
        from jobs.tracking import project_run

        if self._follower is not None:
            return self._follower.finish(TRACKING_SECONDS)
        return project_run(self._run.store.url, **self._settings(), timeout=TRACKING_SECONDS)


class _Interruptible:
    """Ctrl-C and SIGTERM set the event `stop`; a second one ends the process at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Interruptible:
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Puts the handlers in place; signals are the main thread's alone."""
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt
        self.stop.set()
