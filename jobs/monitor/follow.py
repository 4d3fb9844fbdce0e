"""Runs as tables, one run in detail, and a run followed until it ends, from any machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.storage import EventTail, Store
from jobs.monitor.status import LIVE, Status, status_of
from jobs.monitor.stop import in_words
from jobs.run.progress import Reporter

EVENT_SECONDS, STATUS_SECONDS = 1.0, 4.0


def follow(run: Store, console: Console) -> Status:
    """Shows what happens from now on, and how the run is whenever that changes; returns its end."""
    tail = EventTail(run)
    tail.poll()
    shown, next_look = "", 0.0
    with Reporter(console) as reporter:
        while True:
            try:
                new_events, status = tail.poll(), None
                if time.monotonic() >= next_look:
                    status = status_of(run)
            except Exception as error:  # a storage that is away for a moment
                new_events, status = [], None
                next_look = time.monotonic() + STATUS_SECONDS
                print(f"cannot look: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            for event in new_events:
                _show(reporter, event)
            if status is not None:
                away = status.word == "unknown" and status.submission is not None
                if not status.live and not away:  # a cluster may be away for a moment
                    for event in tail.poll():
                        _show(reporter, event)
                    return status
                next_look = time.monotonic() + STATUS_SECONDS
                line = _line(status)
                # The first at once: before the next event there may be nothing else to show.
                if line != shown and (status.word != "running" or not shown):
                    reporter.say(line)
                shown = line
            time.sleep(EVENT_SECONDS)


def _show(reporter: Reporter, event: dict[str, Any]) -> None:
    kind, stage = event["event"], event.get("stage", "")
    if kind == "run_start":
        reporter.say(f"attempt {event['attempt']} has started")
    elif kind == "stage_start":
        reporter.say(f"{stage}: started")
    elif kind == "stage_skip":
        reporter.say(f"{stage}: done before, skipped")
    elif kind == "stage_done":
        reporter.end_stage(stage)
        reporter.say(f"{stage}: done in {event['seconds']:.0f} s")
    elif kind == "stage_failed":
        reporter.end_stage(stage)
        reporter.say(f"{stage} failed: {event['error']}")
    elif kind == "group_lost":
        reporter.say(f"{stage}: {event['what']}: {event['why']}")
    elif kind == "preemption":
        reporter.say(f"{stage}: {event['notice']}; a checkpoint is saved now")
    else:
        reporter.event(event)


def _line(status: Status) -> str:
    where = f"{status.stage}: " if status.stage and status.word in LIVE else ""
    # Numbers that count up are no news.
    return f"{where}{status.word}" + (f", {status.why}" if status.why else "")


COLOURS = {"done": "green", "failed": "red", "lost": "red", "stopped": "yellow", "running": "cyan"}


def table(found: Sequence[tuple[Store, Status]]) -> Table:
    """One line per run."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("Run", "Status", "Stage", "Started", "Took"):
        result.add_column(column, no_wrap=column != "Run", overflow="fold")
    result.add_column("Why", overflow="fold")
    for run, status in found:
        colour = COLOURS.get(status.word, "")
        word = f"[{colour}]{status.word}[/]" if colour else status.word
        stage = (status.stage or "-") if status.live else "-"
        why = status.why.replace("[", "\\[")
        result.add_row(run.name, word, stage, *_times(status), why)
    return result


def _times(status: Status) -> tuple[str, str]:
    if not status.since:
        return "-", "-"
    started = time.strftime("%m-%d %H:%M", time.localtime(status.since))
    return started, span((status.ended or time.time()) - status.since)


def span(seconds: float) -> str:
    """ "42 s", "3 min 20 s", "5 h 12 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def detail(run: Store, status: Status) -> list[str]:
    """A run in lines: how it is and why, where it runs, and what to do about it."""
    lines = [f"{run.name}: {in_words(status)}", f"run        {run.url}"]
    started, took = _times(status)
    if status.attempt:
        when = f", started {started}, {took}" if status.since else ""
        lines.append(f"attempt    {status.attempt}{when}")
    if status.host:
        lines.append(f"driver     on {status.host}")
    sent = status.submission
    if sent is not None:
        ray = f", Ray says {status.ray}" if status.ray else ""
        lines.append(f"Ray job    {sent.id} at {sent.address}{ray}")
    option = "" if status.attempt or sent is None else " --job"
    lines.append(f"logs       stillhouse logs {run.name}{option}")
    if status.live:
        lines.append(f"stop       stillhouse stop {run.name}")
    elif status.word in ("stopped", "lost", "failed"):
        again = (
            f"stillhouse submit SPEC --address {sent.address}" if sent else "stillhouse run SPEC"
        )
        lines.append(f"continue   {again}")
    return lines


def plain(run: Store, status: Status) -> dict[str, Any]:
    """What `--json` prints of a run."""
    sent = status.submission
    return {
        "name": run.name,
        "url": run.url,
        "status": status.word,
        "why": status.why,
        "stage": status.stage,
        "attempt": status.attempt,
        "started": status.since or None,
        "ended": status.ended,
        "host": status.host,
        "job": sent.id if sent else None,
        "address": sent.address if sent else None,
        "ray_status": status.ray,
    }
