"""A run as it goes, from any machine: its events as bars and lines, until it has ended."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console

from cluster.storage import EventTail, Store
from jobs.live.status import LIVE, Status, status_of
from jobs.progress import Reporter

EVENT_SECONDS, STATUS_SECONDS = 1.0, 4.0


def follow(run: Store, console: Console) -> Status:
    """Shows what happens from now on, and how the run is whenever that changes; returns its end."""
    tail = EventTail(run)
    tail.poll()
    shown, next_look = "", 0.0
    with Reporter(console) as reporter:
        while True:
            try:
                news, status = tail.poll(), None
                if time.monotonic() >= next_look:
                    status = status_of(run)
            except Exception as error:  # a storage that is away for a moment
                news, status = [], None
                next_look = time.monotonic() + STATUS_SECONDS
                print(f"cannot look: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            for event in news:
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
