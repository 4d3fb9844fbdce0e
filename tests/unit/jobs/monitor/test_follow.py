"""What `stillhouse watch` shows of a run, without a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster.storage import Attempt, open_store
from jobs.monitor import follow as module
from jobs.run.heartbeat import Heartbeat


def test_a_line_comes_at_once_however_long_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_store(tmp_path / "demo")
    Attempt.claim(run)
    heartbeat = Heartbeat(run, 1)
    heartbeat.event({"event": "stage_start", "stage": "sweep"})
    cells = {"event": "progress", "stage": "sweep", "done": 2, "total": 6, "unit": "cells"}
    heartbeat.event({**cells, "failed": 1})
    heartbeat._publish()
    out = io.StringIO()
    shown_first: list[str] = []

    def sleep(seconds: float) -> None:
        shown_first.append(out.getvalue())
        if len(shown_first) == 3:
            heartbeat.end("done")
            heartbeat._publish()
        clock[0] += seconds

    clock = [1000.0]
    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    end = module.follow(run, Console(file=out, width=200))
    assert end.word == "done"
    assert shown_first[0] == "sweep: running, cell 3 of 6, 1 failed\n" == shown_first[2]
