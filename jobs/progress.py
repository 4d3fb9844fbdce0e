"""Progress of a run: bars on a terminal, plain lines elsewhere; fed by the run's events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.news import line_of

# Plain lines: at most one per stage in so many seconds.
PLAIN_SECONDS = 10.0


class Reporter:
    """Shows events. `progress` and `step` move a bar (or print now and then), others print."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._printed: dict[str, float] = {}
        self._cells = {"done": 0, "failed": 0}

    def __enter__(self) -> Reporter:
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
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
        if kind == "step":
            note = f"loss {event['loss']:.4f}  {event['tokens_per_s']:,.0f} tokens/s"
            self._move(stage, event["step"], event["steps"], note)
        elif kind == "progress":
            rate = event.get("tokens_per_s")
            note = event["unit"] + (f"  {rate:,.0f} tokens/s" if rate else "")
            if stage == "capture":
                stage = f"{stage} {event.get('part', '')}"
            self._move(stage, min(event["done"], event["total"]), event["total"], note)
        elif (line := line_of(event)) is not None:
            self.say(line)
        elif kind == "capture_start" and event["present"]:
            self.say(f"capture: {event['present']} sequences present, {event['missing']} missing")
        elif kind == "cell_done":
            self._cell(event)

    def _cell(self, event: Mapping[str, Any]) -> None:
        self._cells["done" if event["status"] == "done" else "failed"] += 1
        if event["status"] != "done":
            self.say(f"sweep: {event['key']} failed: {event.get('error')}")

    def end_stage(self, stage: str) -> None:
        """Takes the stage's bars away."""
        for name in [n for n in self._tasks if n.split()[0] == stage or stage == ""]:
            if self._bars is not None:
                self._bars.remove_task(self._tasks[name])
            del self._tasks[name]

    def _move(self, name: str, done: int, total: int, note: str) -> None:
        if name == "sweep":
            note = f"cells  {self._cells['failed']} failed"
        if self._bars is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, note=note)
            self._bars.update(self._tasks[name], completed=done, total=total, note=note)
            return
        now = time.monotonic()
        due = now - self._printed.get(name, -PLAIN_SECONDS) >= PLAIN_SECONDS
        if due or done == total:
            self._printed[name] = now
            self.say(f"{name}: {done}/{total}  {note}")
