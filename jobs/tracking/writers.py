"""Writes runs to W&B, offline or online, and follows a run directory while the job runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import wandb

from cluster.storage import Attempt, EventTail, Store
from jobs.report.run_data import RunData, load_run
from jobs.tracking.wandb_runs import Tracked, run_id, wandb_runs

Mode = Literal["online", "offline"]
LOCK_WAIT_S = 20
LARGEST_HTML = 10_000_000  # bytes of a report page that still go into the report run
OWN_FOLDER = ".stillhouse"  # beside the offline-run folders: index, lock, staging
LEAKING = (  # variables meant for a user's own wandb.init: here they would mix up the runs
    "WANDB_RUN_ID",
    "WANDB_NAME",
    "WANDB_NOTES",
    "WANDB_RUN_GROUP",
    "WANDB_JOB_TYPE",
    "WANDB_RESUME",
    "WANDB_SWEEP_ID",
)


@dataclass
class Index:
    """What of a run was published already: W&B run id -> digest, and for offline the folder."""

    path: Path
    entries: dict[str, dict[str, str]] = field(default_factory=dict)

    @staticmethod
    @contextlib.contextmanager
    def locked(out_dir: Path, name: str) -> Iterator[Index]:
        """The index `name`, for one process at a time."""
        folder = out_dir / OWN_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{name}.lock", "w") as lock:
            _lock(lock.fileno())
            index = Index(folder / f"{name}.json")
            with contextlib.suppress(OSError, ValueError):  # a lost index only costs work
                index.entries = dict(json.loads(index.path.read_text()))
            yield index

    def note(self, tracked: Tracked, digest: str, folder: str = "") -> None:
        """Remember a published run; the file is replaced in one step."""
        self.entries[tracked.id] = {"key": tracked.key, "digest": digest, "folder": folder}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.entries, indent=1, sort_keys=True))
        os.replace(temporary, self.path)


def _lock(handle: int) -> None:
    """Wait for the lock, at most LOCK_WAIT_S seconds, which a dying process needs to let go."""
    for _ in range(2 * LOCK_WAIT_S):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("another process is writing this run to W&B already")


@dataclass(frozen=True)
class Target:
    """Where in W&B the runs belong."""

    project: str
    entity: str | None
    tags: tuple[str, ...]

    def digest(self, tracked: Tracked) -> str:
        return "/".join((tracked.digest, self.project, self.entity or "", *self.tags))

    def settings(self, tracked: Tracked, root: Path, mode: Mode, **more: Any) -> wandb.Settings:
        """Quiet and quick: no console capture, no machine statistics, nothing but what is given."""
        return wandb.Settings(
            mode=mode,
            project=self.project,
            entity=self.entity,
            run_tags=self.tags or None,
            run_id=tracked.id,
            run_name=tracked.name,
            run_group=tracked.group,
            run_job_type=tracked.job_type,
            root_dir=str(root),
            use_dot_wandb=False,
            reinit="create_new",
            silent=True,
            quiet=True,
            show_errors=False,
            show_info=False,
            show_warnings=False,
            console="off",
            symlink=False,
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            **more,
        )


class OfflineWriter:
    """One `offline-run-*-<id>` folder per W&B run in `out_dir`, replaced when its data changed.

    A run is written in a staging folder and moved beside the others when it is complete; only
    then its predecessor goes.
    """

    def __init__(self, out_dir: Path, target: Target, index: Index) -> None:
        self.out_dir, self.target, self.index = out_dir, target, index
        self.written: set[str] = set()
        self.unchanged: set[str] = set()
        own = out_dir / OWN_FOLDER
        for left in own.glob(f"{index.path.stem}-staging-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._staging = Path(tempfile.mkdtemp(prefix=f"{index.path.stem}-staging-", dir=own))

    def sync(self, tracked: Tracked) -> None:
        """Write the run, if it is complete and not there already."""
        if not tracked.complete:
            return
        digest = self.target.digest(tracked)
        known = self.index.entries.get(tracked.id, {})
        folders = self._folders(tracked.id)
        if known.get("digest") == digest and [f.name for f in folders] == [known.get("folder")]:
            self.unchanged.add(tracked.id)
            return
        made = self._write(tracked, digest)
        for old in folders:
            shutil.rmtree(old)
        os.rename(made, self.out_dir / made.name)
        self.index.note(tracked, digest, made.name)
        self.written.add(tracked.id)

    def close(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)

    def _folders(self, run_id: str) -> list[Path]:
        return sorted(self.out_dir.glob(f"offline-run-*-{run_id}"))

    def _write(self, tracked: Tracked, digest: str) -> Path:
        settings = self.target.settings(tracked, self._staging, "offline")
        # wandb keeps the files of tables outside the run's folder and notes their absolute path:
        # they must live as long as the folder does.
        media = self.out_dir / OWN_FOLDER / f"media-{tracked.id}"
        if tracked.table:
            shutil.rmtree(media, ignore_errors=True)
            os.environ["WANDB_DATA_DIR"] = str(media)
        run = wandb.init(settings=settings, config=tracked.config)
        folder = Path(run.settings.sync_dir)
        _log(run, tracked, 0)
        _finish(run, tracked)
        return folder


class OnlineWriter:
    """Sends runs to the W&B service; a run that is there is resumed and gets only what is new.

    Written from the client's source and tried against a server that does not answer, never
    against the real service. `resume="allow"` with a fixed id makes the service tell the next
    free step (`run.starting_step`); earlier steps are not sent again.
    """

    def __init__(self, out_dir: Path, target: Target, index: Index, init_timeout: float) -> None:
        self.out_dir, self.target, self.index = out_dir, target, index
        self.init_timeout = init_timeout
        self.written: set[str] = set()
        self.unchanged: set[str] = set()
        self._open: dict[str, wandb.Run] = {}
        self._next: dict[str, int] = {}

    def sync(self, tracked: Tracked) -> None:
        """Send what is new; a run whose stage is at work stays open for the next call."""
        digest = self.target.digest(tracked)
        if self.index.entries.get(tracked.id, {}).get("digest") == digest:
            self.unchanged.add(tracked.id)
            return
        if not tracked.complete and (tracked.table or not tracked.history):
            return
        run = self._open.get(tracked.id) or self._start(tracked)
        self._next[tracked.id] = _log(run, tracked, self._next[tracked.id])
        if tracked.complete:
            del self._open[tracked.id]
            _finish(run, tracked)
            self.index.note(tracked, digest)
            self.written.add(tracked.id)

    def close(self) -> None:
        """End the runs that an error left open."""
        for run in self._open.values():
            run.finish(exit_code=1)
        self._open.clear()

    def _start(self, tracked: Tracked) -> wandb.Run:
        root = self.out_dir.parent if self.out_dir.name == "wandb" else self.out_dir
        settings = self.target.settings(
            tracked,
            root,
            "online",
            resume="allow",
            allow_val_change=True,
            init_timeout=self.init_timeout,
        )
        run = wandb.init(settings=settings, config=tracked.config)
        self._open[tracked.id] = run
        self._next[tracked.id] = run.starting_step
        return run


def _log(run: wandb.Run, tracked: Tracked, first: int) -> int:
    """Log the history from step `first` on; returns the step after the last one logged."""
    following = first
    for step, row in tracked.history:
        if step >= first:
            run.log(row, step=step)
            following = step + 1
    return following


def _finish(run: wandb.Run, tracked: Tracked) -> None:
    if tracked.table:
        headings, lines = tracked.table
        media: dict[str, Any] = {"headline": wandb.Table(columns=[*headings], data=lines)}
        if tracked.html and len(tracked.html.encode()) <= LARGEST_HTML:
            media["report"] = wandb.Html(tracked.html, inject=False, data_is_not_path=True)
        run.log(media)
    run.summary.update(tracked.summary)
    run.finish(exit_code=1 if tracked.failed else 0)


def isolate() -> None:
    """Take variables that are meant for one wandb run out of this process's environment."""
    for name in LEAKING:
        os.environ.pop(name, None)


def target(project: str, entity: str | None, tags: list[str]) -> Target:
    """Where runs go; WANDB_PROJECT and WANDB_ENTITY win, WANDB_TAGS are added."""
    added = [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]
    return Target(
        project=os.environ.get("WANDB_PROJECT") or project,
        entity=os.environ.get("WANDB_ENTITY") or entity,
        tags=tuple(dict.fromkeys([*tags, *added])),
    )


def publish(
    store: Store,
    mode: str,
    where: Target,
    out_dir: Path,
    *,
    init_timeout: float = 30.0,
    follow: Callable[[], bool] | None = None,
    attempt: int = 0,
) -> str:
    """Bring W&B up to date with a run directory; returns what was done, in one line.

    `mode` is online or offline. With `follow` it goes on until the run ends: live curves online,
    finished cells and stages offline. `follow()` waits a while and returns False once nothing
    more will come (the driver is gone). `attempt` is the one whose end is waited for; 0 is the
    newest. Raises what wandb or the storage raises.
    """
    isolate()
    began = time.monotonic()
    name = run_id(store.url, store.name, "index") + ("" if mode == "offline" else "-online")
    with Index.locked(out_dir, name) as index:
        writer: OfflineWriter | OnlineWriter
        if mode == "offline":
            writer = OfflineWriter(out_dir, where, index)
        else:
            writer = OnlineWriter(out_dir, where, index, init_timeout)
        try:
            abandoned = False
            if follow is not None:
                abandoned = not _follow(store, writer, follow, attempt or Attempt.latest(store))
            for tracked in wandb_runs(load_run(store), _page(store)):
                failed = tracked.failed or (abandoned and not tracked.complete)
                writer.sync(replace(tracked, complete=True, failed=failed))
        finally:
            writer.close()
    seconds = time.monotonic() - began
    return (
        f"W&B {mode}: {len(writer.written)} runs written, "
        f"{len(writer.unchanged - writer.written)} unchanged ({seconds:.1f} s), project "
        f"{where.project}" + (f", in {out_dir}" if mode == "offline" else "")
    )


def _page(store: Store) -> str | None:
    return store.read_text("report/index.html") if store.exists("report/index.html") else None


def _follow(
    store: Store, writer: OfflineWriter | OnlineWriter, wait: Callable[[], bool], attempt: int
) -> bool:
    """Sync again at every news; True when the attempt's run_end came, False when abandoned."""
    tail = EventTail(store)
    events: list[dict[str, Any]] = []
    data: RunData | None = None
    going = True
    while True:
        new_events = tail.poll()
        events += new_events
        if new_events:
            if data is None or any(event.get("event") != "step" for event in new_events):
                data = load_run(store, list(events))
            else:
                data = replace(data, events=list(events))
            for tracked in wandb_runs(data):
                if tracked.table is None:
                    writer.sync(tracked)
        if any(e.get("event") == "run_end" and e.get("attempt", 0) >= attempt for e in events):
            return True
        if not going:
            return False
        going = wait()  # one more poll follows: what the driver wrote last is still read
