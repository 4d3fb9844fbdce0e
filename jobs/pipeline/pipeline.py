"""The pipeline: which stages a run needs, which are done, and running the others in order."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.session import Cluster, ask_to_grow, connect, target
from cluster.storage import EventTail, EventWriter, Fenced, Store, open_store
from jobs.errors import Interrupted, SpecErrors, StageFailed, Superseded
from jobs.forecast.dtypes import decide_dtypes, local_dtypes, training_device
from jobs.forecast.place import Core, slowest
from jobs.pipeline import preflight
from jobs.pipeline.skip import StageSelection, is_current
from jobs.run.context import Context
from jobs.run.directory import RunDir
from jobs.run.heartbeat import Heartbeat, job_of_driver, tries_left
from jobs.run.inputs import ResolvedJob
from jobs.run.log import LogSegments
from jobs.run.progress import Reporter, chatter_to, log_file
from jobs.run.requests import Interruptible, StopWatch
from jobs.spec.job import JobSpec
from jobs.spec.load import dump_spec
from jobs.spec.resolve import absolute_paths, resolve_group_sizes
from jobs.stages import STAGES
from trainer.checks import faults_in
from trainer.processor import DtypeName, this_device
from trainer.resolve_auto import recorded_dtypes, resolve, undecided_dtypes, with_auto

# How long the end of a run waits for Weights & Biases.
TRACKING_SECONDS = 120.0
_ENDS = {"done": "done", "failed": "failed", "stopped": "interrupted"}  # in the events


def run_pipeline(
    spec: JobSpec,
    *,
    address: str | None = None,
    until: str | None = None,
    only: str | None = None,
    redo: str | None = None,
) -> int:
    """Runs what is left of a job; returns 0.

    Raises SpecErrors (wrong input; before Ray starts wherever that can be known), StageFailed,
    Superseded, or Interrupted after a clean stop.
    """
    job = prepare_job(spec, until, only, redo, local=target(address) == "local")
    if not job.selection.to_run:
        console = Console(highlight=False)
        for stage in job.selection.skipped:
            console.print(f"{stage}: done before, skipped", markup=False)
        show_result(console, job.run)
        return 0
    return _Attempt(job, address).go()


@dataclass(frozen=True)
class Job:
    """A job that has passed all checks that need no cluster, and what is left of it."""

    asked: JobSpec  # as the user wrote it
    resolved: ResolvedJob
    run: RunDir
    selection: StageSelection
    stages: tuple[str | None, str | None, str | None]  # until, only, redo
    undecided: list[str]  # sections whose dtype the cluster's nodes decide

    @property
    def spec(self) -> JobSpec:
        """The resolved spec."""
        return self.resolved.spec


def prepare_job(
    spec: JobSpec,
    until: str | None = None,
    only: str | None = None,
    redo: str | None = None,
    *,
    local: bool = False,
    dtypes: Mapping[str, DtypeName] | None = None,
    gpus: bool | None = None,
) -> Job:
    """Checks a job and says what is left of it. Raises SpecErrors; nothing is started.

    `dtype: auto` becomes what the run computed in before. For a new run it is what this machine is
    fast at, which stands if the job runs here alone (`local`); else the nodes decide, and what they
    say comes as `dtypes`. gpus: whether the cluster has any; None: as this machine.
    """
    asked = spec
    storage = _open_storage(spec)
    try:
        run = RunDir(storage.sub(spec.name))
        known = {**(dtypes or {}), **recorded_dtypes(run.store)}
        undecided = [] if local else [name for name in undecided_dtypes(spec) if name not in known]
        device = training_device(spec, this_device() == "cuda" if gpus is None else gpus)
        spec = absolute_paths(resolve(spec, {**local_dtypes(spec), **known}, device))
        resolved = ResolvedJob.of(spec, storage)
        resolved = resolved.with_spec(resolve_group_sizes(spec, resolved.names))
        redo = _left_to_redo(run, redo)
        selection = StageSelection(resolved, run, until, only, redo)
    except ValueError as error:
        raise error if isinstance(error, SpecErrors) else SpecErrors([str(error)]) from error
    faults: list[str] = []
    for stage in selection.to_run:
        faults += [line for line in STAGES[stage].faults(resolved) if line not in faults]
    if faults:
        raise SpecErrors(faults)
    return Job(asked, resolved, run, selection, (until, only, redo), undecided)


def _open_storage(spec: JobSpec) -> Store:
    """The root of the storage. Raises SpecErrors: unknown protocol, not writable."""
    found: list[Store] = []

    def look() -> None:
        found.append(open_store(spec.storage))
        found[0].check_writable()

    if faults := faults_in(look, "storage"):
        raise SpecErrors(faults)
    return found[0]


def _left_to_redo(run: RunDir, redo: str | None) -> str | None:
    """`redo`, unless an earlier attempt of this same Ray job began with it: then that goes on."""
    job = job_of_driver()
    if redo is None or job is None:
        return redo
    return None if run.was_begun(redo, job) else redo


class _Attempt:
    """One start of a run, from its number to its last word."""

    def __init__(self, job: Job, address: str | None) -> None:
        self.job, self.address = job, address
        self.attempt = job.run.claim(job=job_of_driver())
        self.log = log_file(job.run.store, self.attempt.number)
        self.began = time.time()
        self.tracking: _Tracking | None = _Tracking(job.spec, job.run)

    def go(self) -> int:
        """Runs what is left; see `run_pipeline`."""
        job, store, number = self.job, self.job.run.store, self.attempt.number
        # Signals last until the last word is out: a job's end may be asked for more than once.
        with (
            Interruptible() as signals,
            Heartbeat(store, number, job=job_of_driver(), tries_left=tries_left()) as heartbeat,
            chatter_to(self.log) as console,
            LogSegments(store, number, self.log),
            EventWriter(store, number) as events,
            StopWatch(store, number, signals.stop, heartbeat.cut_off),
        ):
            status, error = "failed", None
            try:
                self._keep_spec(with_auto(job.spec, job.undecided))
                events.emit("run_start", name=job.spec.name, spec=job.spec.model_dump(mode="json"))
                with Reporter(console) as reporter:
                    self._stages(events, heartbeat, reporter, signals)
                status = "done"
            except Interrupted as stop_error:
                status, error = "stopped", str(stop_error)
                told = f"{stop_error}; continue with: {_command(job.spec)}"
                raise Interrupted(told) from stop_error
            except KeyboardInterrupt:
                status, self.tracking = "stopped", None
                raise
            except Fenced as failure:
                error = str(failure)
                heartbeat.update(tries_left=0)
                raise Superseded(error) from failure
            except SpecErrors as failure:  # the same in every try
                error = " ".join(str(failure).split())[:1000]
                heartbeat.update(tries_left=0)
                raise
            except Exception as failure:
                error = " ".join(str(failure).split())[:1000]
                raise
            finally:
                with contextlib.suppress(Exception):  # never hide the error that ended the run
                    seconds = time.time() - self.began
                    events.emit("run_end", status=_ENDS[status], seconds=seconds)
                    events.flush()
                note = self.tracking.finish() if self.tracking is not None else ""
                if note:
                    console.print(note, markup=False, soft_wrap=True)
                if status == "stopped":
                    console.print(f"log: {self.log}", markup=False, soft_wrap=True)
                heartbeat.end(status, error)
            if "summarize" in job.selection.to_run:
                show_result(console, job.run)
            console.print(f"log: {self.log}", markup=False, soft_wrap=True)
        return 0

    def _keep_spec(self, spec: JobSpec) -> None:
        self.attempt.write_bytes("spec.yaml", dump_spec(spec).encode())

    def _stages(
        self, events: EventWriter, heartbeat: Heartbeat, reporter: Reporter, signals: Interruptible
    ) -> None:
        """Connects to the cluster, looks at it, and runs the stages in order."""
        job = self.job
        reporter.say(f"run {job.run.store.url}, attempt {self.attempt.number}, log {self.log}")
        for stage in job.selection.skipped:
            events.emit("stage_skip", stage=stage)
            reporter.say(f"{stage}: done before, skipped")
        heartbeat.update(waits="connecting to Ray")
        reporter.waits("", "connecting to Ray")
        with contextlib.ExitStack() as connected:
            try:
                cluster = connected.enter_context(connect(self.address))
            except ConnectionError as failure:
                raise SpecErrors([f"--address: {failure}"]) from failure
            if job.spec.resources.growth_minutes:
                connected.callback(ask_to_grow, [])  # what was asked for would be held for ever
            signals.install()  # Ray has put its own handler of SIGTERM in place
            cluster = self._look(cluster, heartbeat, reporter, signals)
            job = self.job  # with the dtypes that the nodes are fast at
            tail = EventTail(job.run.store)
            tail.poll()  # what earlier attempts said is not news
            context = Context(
                job.run,
                job.resolved,
                dict(job.selection.outputs),
                events,
                tail,
                reporter,
                cluster,
                heartbeat,
                signals.stop,
                to_run=tuple(job.selection.to_run),
            )
            for stage in job.selection.to_run:
                _run_stage(stage, context, self.log, forced=stage in job.selection.forced)

    def _look(
        self, cluster: Cluster, heartbeat: Heartbeat, reporter: Reporter, signals: Interruptible
    ) -> Cluster:
        """Refuses a cluster on which the job cannot work, before anything of it is taken."""
        job, stopped = self.job, signals.stop.is_set

        def notify(why: str) -> None:
            heartbeat.update(waits=why)
            reporter.waits("", why)

        grown = preflight.wait_for_resources(
            job.spec, job.selection.to_run, cluster, stopped, notify
        )
        try:
            cores = preflight.cores(grown, stopped, reporter.say, notify)
            job = self._decide(grown, cores, reporter)
            scratch = self._keep_plan(grown, slowest(cores))
            preflight.nodes(job.spec, job.run, grown, scratch, stopped, reporter.say, notify)
        except preflight.NodesSilent as error:
            command = _command(job.spec)
            raise StageFailed("preflight", str(error), str(self.log), command) from error
        # A node may have gone meanwhile.
        found = preflight.wait_for_resources(job.spec, job.selection.to_run, grown, stopped, notify)
        notify("starting")
        return found

    def _decide(self, cluster: Cluster, cores: Sequence[Core], reporter: Reporter) -> Job:
        """The job with each `auto` that the nodes decide, if it is still open; kept from now."""
        job = self.job
        if job.undecided or (cluster.gpus > 0) != (this_device() == "cuda"):
            spec = with_auto(job.spec, job.undecided)
            dtypes = decide_dtypes(spec, cluster.gpus > 0, [core.dtype for core in cores])
            decided = prepare_job(job.asked, *job.stages, dtypes=dtypes, gpus=cluster.gpus > 0)
            self.job = job = replace(decided, run=job.run)
            self._keep_spec(job.spec)
        if asked := undecided_dtypes(job.asked):
            told = ", ".join(f"{name} {getattr(job.spec, name).dtype}" for name in asked)
            reporter.say(f"dtype: {told}")
        return job

    def _keep_plan(self, cluster: Cluster, core: Core | None) -> int:
        """Keeps with the run what is to be expected of it, for the report to compare.

        core: the slowest of the nodes'. Returns the bytes that a node needs for its part of a
        checkpoint.
        """
        if not {"capture", "distill", "sweep"} & set(self.job.selection.to_run):
            return 0
        from jobs.forecast.forecast import record

        types = [name for name in cluster.gpu_types if name]
        try:
            gpu = types[0] if types else None
            found = record(
                self.job.spec, cluster.nodes, gpu, cluster.memory, core, self.job.resolved
            )
        except Exception:  # a forecast that fails is no reason to fail the run
            traceback.print_exc()
            return 0
        self.attempt.write_json("plan.json", found)
        if "distill" not in self.job.selection.to_run:
            return 0
        return int(found.get("storage", {}).get("checkpoint", 0)) // cluster.machines


def _run_stage(stage: str, context: Context, log: Path, forced: bool) -> None:
    """One stage, from its start to its record; errors become the user's."""
    began = time.time()
    inputs = STAGES[stage].inputs(context.job, context.outputs)
    record = context.run.record(stage)
    if record is not None and is_current(record, inputs) and not forced:
        context.outputs[stage] = record.outputs
        context.events.emit("stage_skip", stage=stage)
        context.reporter.say(f"{stage}: done before, skipped")
        return
    context.reporter.waits("", None)
    context.release(but=stage)
    context.emit("stage_start", stage=stage)
    if context.stop.is_set():
        raise Interrupted(f"stopped before {stage}")
    context.forced = forced
    try:
        if forced:
            STAGES[stage].reset(context)
            context.run.forget(stage)
        outputs = STAGES[stage].run(context)
    except (Interrupted, SpecErrors):
        raise
    except Exception as error:
        traceback.print_exc()
        why = " ".join(str(error).split()) or type(error).__name__
        context.events.emit("stage_failed", stage=stage, error=why)
        if isinstance(error, Fenced):
            raise
        raise StageFailed(stage, why, str(log), _command(context.spec)) from error
    finally:
        context.reporter.end_stage(stage)
    seconds = time.time() - began
    context.outputs[stage] = outputs
    context.run.finish(stage, inputs.values(), outputs, seconds)
    context.emit("stage_done", stage=stage, seconds=seconds, metrics=outputs.get("metrics", {}))
    remark = STAGES[stage].remark(outputs)
    context.reporter.say(f"{stage}: done in {seconds:.0f} s{remark and f', {remark}'}")


def _command(spec: JobSpec) -> str:
    """The command that continues: the one that was given, here or where the job was sent from."""
    if job_of_driver() is not None:
        return "stillhouse submit, with what it was sent with"
    return " ".join(["stillhouse", *sys.argv[1:]]) if sys.argv[1:] else f"run of {spec.name}"


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
        from jobs.tracking.launch import resolve as resolve_mode

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
