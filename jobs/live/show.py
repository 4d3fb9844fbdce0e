"""Runs in a table, and one run in detail."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from cluster.storage import Store
from jobs.live.status import Status
from jobs.live.stop import in_words

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
