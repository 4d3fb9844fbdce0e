"""Progress of a run: bars on a terminal, plain lines elsewhere, and a log file for everything else.

The chatter of Ray, DeepSpeed and their children is written to file descriptors 1 and 2, not through
Python, so these descriptors are pointed at the log; the user's terminal keeps a copy of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.storage import Store
from jobs.run.heartbeat import AT_WORK, Remaining, in_words
from trainer.messages import format_event

# Plain lines: at most one per stage in so many seconds.
PLAIN_SECONDS = 8.0
# What is waited for is said after so long, and again after so long.
WAIT_SECONDS, WAIT_AGAIN_SECONDS = 10.0, 90.0
# Seconds that a bar's estimate looks back.
ESTIMATE_SECONDS = 300.0

WAIT = " wait"  # the name of the bar that shows it; no stage has it


class Reporter:
    """Shows events. `progress` and `step` move bars (or print now and then), others print."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._printed: dict[str, float] = {}
        self._remaining = Remaining()
        self._wait: tuple[str, float, float] = ("", 0.0, 0.0)  # what, since when, said when

    def __enter__(self) -> Reporter:
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}"),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                speed_estimate_period=ESTIMATE_SECONDS,
                transient=True,
                redirect_stdout=False,  # what Python prints belongs to the log, as all chatter
                redirect_stderr=False,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def event(self, event: Mapping[str, Any]) -> None:
        """Shows one event of the run."""
        kind, stage = event["event"], event.get("stage", "")
        if kind == "at_work":
            self.waits(stage, "loading the model")
        elif kind in AT_WORK:
            self.waits(stage, None)
        if kind == "step":
            note = f"loss {event['loss']:.4f}  {event['tokens_per_s']:,.0f} tokens/s"
            self._move(stage, event["step"], event["steps"], note)
        elif kind == "progress":
            rate = event.get("tokens_per_s")
            note = event.get("within", event["unit"]) + (f"  {rate:,.0f} tokens/s" if rate else "")
            if "failed" in event:
                note += f"  {event['failed']} failed"
            if stage == "capture":
                stage = f"{stage} {event.get('part', '')}"
            done, total = min(event["done"], event["total"]), event["total"]
            self._move(stage, done, total, note, event.get("share"), event.get("tasks", ()))
        elif (line := format_event(event)) is not None:
            self.say(line)
        elif kind == "capture_start" and event["present"]:
            self.say(f"capture: {event['present']} sequences present, {event['missing']} missing")
        elif kind == "cell_done" and event["status"] != "done":
            self.say(f"sweep: {event['key']} failed: {event.get('error')}")

    def waits(self, stage: str, why: str | None) -> None:
        """What a stage waits for before its work begins; None: it has begun.

        Call it again while that goes on. A bar shows it at once, a plain line follows when it has
        taken a while.
        """
        now = time.monotonic()
        if why is None:
            self._wait = ("", now, now)
            self._drop(WAIT)
            return
        line = f"{stage}: {why}" if stage else why
        if self._bars is not None:
            self._row(WAIT, stage or "starting", 0, None, note=why)
        what, since, said = self._wait
        if what != line:
            self._wait = (line, now, now + WAIT_SECONDS - WAIT_AGAIN_SECONDS)
        elif now - said >= WAIT_AGAIN_SECONDS and self._bars is None:
            self._wait = (line, since, now)
            self.say(line)

    def end_stage(self, stage: str) -> None:
        """Takes the stage's bars away."""
        self.waits(stage, None)
        for name in [n for n in self._tasks if n.split()[0] == stage or stage == ""]:
            self._drop(name)

    def _move(
        self,
        name: str,
        done: float,
        total: int,
        note: str,
        share: float | None = None,
        tasks: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """share: of the work, where `done` of `total` does not say it all. tasks: that run now."""
        count = f"{int(done)}/{total}"
        if self._bars is not None:
            if share is None:
                self._row(name, name, done, total, count, note)
            else:
                self._row(name, name, share, 1.0, count, note)
            self._rows_of(name, tasks)
            return
        now = time.monotonic()
        ahead = done / total if total else 1.0
        left = self._remaining.seconds(name, ahead if share is None else share, now)
        due = now - self._printed.get(name, -PLAIN_SECONDS) >= PLAIN_SECONDS
        if due or done == total:
            self._printed[name] = now
            words = [f"{count}  {note}", *(f"{t['key']}: {t['words']}" for t in tasks)]
            if left is not None:
                words.append(in_words(left))
            self.say(f"{name}: " + ", ".join(words))

    # Bars by name; those of single tasks are named after the bar that they belong to.

    def bars(self) -> list[str]:
        """The bars there are, each in words."""
        rows = self._bars.tasks if self._bars is not None else []
        return [f"{row.description} {row.fields['count']} {row.fields['note']}" for row in rows]

    def _rows_of(self, name: str, tasks: Sequence[Mapping[str, Any]]) -> None:
        rows = {f"{name} {task['key']}": task for task in tasks}
        for gone in [n for n in self._tasks if n.startswith(f"{name} ") and n not in rows]:
            self._drop(gone)
        for row, task in rows.items():
            self._row(row, f"  {task['key']}", task["share"], 1.0, note=task["words"])

    def _row(
        self,
        name: str,
        title: str,
        done: float,
        total: float | None,
        count: str = "",
        note: str = "",
    ) -> None:
        assert self._bars is not None
        # Names of cells and of models hold no markup.
        title, note = escape(title), escape(note)
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(title, total=total, count=count, note=note)
        self._bars.update(
            self._tasks[name],
            completed=done,
            total=total,
            description=title,
            count=count,
            note=note,
        )

    def _drop(self, name: str) -> None:
        if self._bars is not None and name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))


def log_file(run: Store, attempt: int) -> Path:
    """The log of an attempt: in the run directory where that is local, else in the user's cache."""
    local = run.local("logs")
    if local is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        # Runs of one name may be on several storages.
        place = hashlib.blake2b(run.url.encode(), digest_size=4).hexdigest()
        local = cache / "stillhouse" / "logs" / f"{run.name}-{place}"
    local.mkdir(parents=True, exist_ok=True)
    return local / f"{attempt:04d}.log"


@contextlib.contextmanager
def chatter_to(path: Path) -> Iterator[Console]:
    """Sends file descriptors 1 and 2 to `path`; yields a console on the real terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    terminal = io.TextIOWrapper(os.fdopen(os.dup(saved[0]), "wb", buffering=0), write_through=True)
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        yield Console(file=terminal, highlight=False)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(saved, start=1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(target)
        terminal.flush()
