"""What a run shows: bars on a terminal, now and then a line elsewhere, and no chatter of others."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jobs.run.progress import Reporter

STEP = {"event": "step", "stage": "distill", "steps": 100, "loss": 1.25, "tokens_per_s": 5000.0}


def test_chatter_does_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = io.StringIO()
    with Reporter(Console(file=terminal, force_terminal=True, width=100)) as reporter:
        reporter.event({**STEP, "step": 7})
        print("(RayTrainWorker) chatter")
        reporter.say("prepare: done")
    assert "chatter" not in terminal.getvalue()
    assert "prepare: done" in terminal.getvalue() and "7/100" in terminal.getvalue()
    assert "chatter" in capsys.readouterr().out


def test_plain_lines_are_few() -> None:
    plain = io.StringIO()
    with Reporter(Console(file=plain, width=100)) as reporter:
        for step in range(1, 101):
            reporter.event({**STEP, "step": step})
    assert plain.getvalue().splitlines() == [
        "distill: 1/100  loss 1.2500  5,000 tokens/s",
        "distill: 100/100  loss 1.2500  5,000 tokens/s",
    ]


def test_failed_cells_are_named_and_counted() -> None:
    plain = io.StringIO()
    with Reporter(Console(file=plain, width=200)) as reporter:
        cell = {"event": "cell_done", "stage": "sweep", "key": "hqq-2b-g64"}
        reporter.event({**cell, "status": "failed", "error": "ValueError: no"})
        reporter.event(
            {
                "event": "progress",
                "stage": "sweep",
                "done": 1,
                "total": 1,
                "unit": "cells",
                "failed": 1,
            }
        )
    assert plain.getvalue().splitlines() == [
        "sweep: hqq-2b-g64 failed: ValueError: no",
        "sweep: 1/1  cells  1 failed",
    ]


def test_evaluations_and_resumes_are_told() -> None:
    plain = io.StringIO()
    with Reporter(Console(file=plain, width=200)) as reporter:
        said = {"event": "evaluation", "stage": "distill", "step": 20, "select_perplexity": 12.345}
        reporter.event({**said, "select_forward_kl": 0.25})
        reporter.event({**said, "stage": "control"})
        resumed = {"event": "resume", "stage": "distill", "step": 20, "saved_by": 3}
        reporter.event({**resumed, "world": 3})
        reporter.event({**resumed, "world": 2})
    assert plain.getvalue().splitlines() == [
        "distill: step 20, perplexity on select 12.35, KL to the teacher 0.2500",
        "control: step 20, perplexity on select 12.35",
        "distill: continues from the checkpoint of step 20",
        "distill: continues from the checkpoint of step 20, which 3 ranks saved and 2 go on with",
    ]


SWEEP = {
    "event": "progress",
    "stage": "sweep",
    "done": 2,
    "total": 6,
    "unit": "cells",
    "failed": 1,
    "share": 0.41,
    "tasks": [{"key": "hqq-4b-g64", "share": 0.3, "words": "evaluated on report: 12 of 64"}],
}


def test_a_step_of_minutes_shows_how_far_it_is() -> None:
    within = {"event": "progress", "stage": "distill", "done": 3.25, "total": 40, "unit": "steps"}
    within["within"] = "2 of 8 micro-batches"
    plain, terminal = io.StringIO(), io.StringIO()
    with Reporter(Console(file=plain, width=200)) as reporter:
        reporter.event(within)
    assert plain.getvalue().splitlines() == ["distill: 3/40  2 of 8 micro-batches"]
    with Reporter(Console(file=terminal, force_terminal=True, width=120)) as reporter:
        reporter.event(within)
        assert reporter.bars() == ["distill 3/40 2 of 8 micro-batches"]


def test_running_tasks_of_a_sweep_are_shown_and_go() -> None:
    terminal = io.StringIO()
    with Reporter(Console(file=terminal, force_terminal=True, width=120)) as reporter:
        reporter.event(SWEEP)
        shown = reporter.bars()
        assert [row.split() for row in shown] == [
            ["sweep", "2/6", "cells", "1", "failed"],
            ["hqq-4b-g64", "evaluated", "on", "report:", "12", "of", "64"],
        ]
        reporter.event({**SWEEP, "done": 3, "tasks": []})
        assert len(reporter.bars()) == 1
        reporter.end_stage("sweep")
        assert reporter.bars() == []


def test_plain_lines_name_tasks_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, clock = io.StringIO(), [1000.0]
    monkeypatch.setattr("jobs.run.progress.time.monotonic", lambda: clock[0])
    with Reporter(Console(file=plain, width=200)) as reporter:
        reporter.event(SWEEP)
        clock[0] += 5  # too soon for another line
        reporter.event({**SWEEP, "share": 0.42})
        clock[0] += 5
        reporter.event({**SWEEP, "share": 0.46})
    task = "hqq-4b-g64: evaluated on report: 12 of 64"
    assert plain.getvalue().splitlines() == [
        f"sweep: 2/6  cells  1 failed, {task}",
        f"sweep: 2/6  cells  1 failed, {task}, about 2 min left",
    ]


def test_what_is_waited_for_is_shown_until_the_work_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    with Reporter(Console(file=terminal, force_terminal=True, width=120)) as reporter:
        reporter.waits("capture", "starting 2 workers")
        assert "starting 2 workers" in reporter.bars()[0]
        reporter.event({"event": "at_work", "stage": "capture"})
        assert "starting" not in reporter.bars()[0]
        reporter.event({"event": "capture_start", "stage": "capture", "present": 0, "missing": 4})
        assert reporter.bars() == []
    plain, clock = io.StringIO(), [1000.0]
    monkeypatch.setattr("jobs.run.progress.time.monotonic", lambda: clock[0])
    with Reporter(Console(file=plain, width=200)) as reporter:
        for _ in range(40):  # every 3 s for two minutes
            reporter.waits("capture", "starting 2 workers")
            clock[0] += 3
    assert plain.getvalue().splitlines() == 2 * ["capture: starting 2 workers"]
