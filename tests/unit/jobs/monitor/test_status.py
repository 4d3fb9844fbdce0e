"""How a run is, in words, from what its driver has published."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.ray_jobs import RayJob
from cluster.storage import Attempt, EventWriter, Store, open_store
from jobs.monitor import status as module
from jobs.monitor.follow import detail, plain, span
from jobs.monitor.status import Status, status_of
from jobs.monitor.submissions import Submission, record
from jobs.run.heartbeat import Heartbeat, live_path
from jobs.run.requests import ask_stop


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    store = open_store(tmp_path / "runs" / "demo")
    Attempt.claim(store)
    return store


def publish(run: Store, *events: dict[str, Any], **fields: Any) -> None:
    """What a driver publishes after these events."""
    heartbeat = Heartbeat(run, 1)
    for event in events:
        heartbeat.event(event)
    heartbeat.update(**fields)
    heartbeat._publish()


START = {"event": "stage_start", "stage": "distill"}
LOST = {"event": "group_lost", "stage": "distill", "what": "a lost node", "max_failures": 2}
STEP = {"event": "step", "stage": "distill", "step": 120, "steps": 400}
CELL = {"event": "cell_done", "stage": "sweep", "status": "failed"}
TASK = {"key": "hqq-4b-g64", "share": 0.3, "words": "quantizing: 40 %"}
CELLS = {"event": "progress", "stage": "sweep", "done": 2, "total": 12, "unit": "cells"}


@pytest.mark.parametrize(
    ("events", "fields", "word", "why"),
    [
        ([START, STEP], {}, "running", "step 120 of 400"),
        ([{**START, "stage": "sweep"}, CELL, CELLS], {}, "running", "cell 3 of 12, 1 failed"),
        (
            [{**START, "stage": "sweep"}, {**CELLS, "failed": 1, "share": 0.2, "tasks": [TASK]}],
            {},
            "running",
            "cell 3 of 12, 1 failed, hqq-4b-g64: quantizing: 40 %",
        ),
        ([START, {"event": "at_work", "stage": "distill"}], {}, "running", ""),
        ([START, STEP, LOST], {}, "restarting", "restarting after a lost node, attempt 2 of 3"),
        ([START, LOST, STEP], {}, "running", "step 120 of 400"),
        (
            [START, LOST, STEP, LOST],
            {},
            "restarting",
            "restarting after a lost node, attempt 3 of 3",
        ),
        ([START, LOST, LOST, LOST], {}, "restarting", "a lost node, the last of 3 attempts"),
        (
            [START],
            {"waits": "waiting for 8 GPUs: cluster has 4, 2 free"},
            "waiting",
            "waiting for 8 GPUs: cluster has 4, 2 free",
        ),
        ([], {"status": "failed", "error": "disk full"}, "failed", "disk full"),
        ([], {"status": "stopped", "error": None}, "stopped", ""),
    ],
)
def test_what_a_driver_does_and_why_it_waits(
    run: Store, events: list[dict[str, Any]], fields: dict[str, Any], word: str, why: str
) -> None:
    publish(run, *events, **fields)
    found = status_of(run)
    assert (found.word, found.why) == (word, why)
    assert found.live == (word in ("running", "waiting", "restarting"))


def test_workers_that_are_at_work_are_waited_for_no_more(run: Store) -> None:
    heartbeat = Heartbeat(run, 1)
    heartbeat.event({**START, "stage": "capture"})
    heartbeat.update(waits="starting 2 workers of 1 CPUs and 0 GPUs")
    heartbeat._publish()
    assert status_of(run).word == "waiting"
    heartbeat.event({"event": "at_work", "stage": "capture"})
    heartbeat._publish()
    assert status_of(run).word == "running"


def test_what_is_left_is_told_once_it_can_be_guessed(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("jobs.run.heartbeat.time.monotonic", lambda: clock[0])
    heartbeat = Heartbeat(run, 1)
    heartbeat.event({**START, "stage": "sweep"})
    for share in (0.1, 0.2):
        heartbeat.event({**CELLS, "share": share})
        clock[0] += 60
    heartbeat._publish()
    assert status_of(run).why == "cell 3 of 12, 0 failed, about 8 min left"


def test_a_run_that_is_asked_to_stop_is_stopping(run: Store) -> None:
    publish(run, START, STEP)
    ask_stop(run, 1)
    assert status_of(run).word == "stopping"


def rewrite(run: Store, **fields: Any) -> None:
    path = live_path(1)
    run.write_json(path, {**run.read_json(path), **fields})


def test_a_driver_without_a_sign_is_lost(run: Store) -> None:
    publish(run, START, STEP)
    rewrite(run, host="elsewhere", t=time.time() - 60)
    assert status_of(run).word == "running"
    rewrite(run, t=time.time() - 100)
    found = status_of(run)
    assert found.word == "lost" and "gave no sign for 100 s" in found.why and not found.live


def test_a_driver_whose_process_is_gone_is_lost_sooner(run: Store) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    publish(run, START)
    rewrite(run, host=socket.gethostname(), pid=process.pid, t=time.time() - 30)
    assert "is gone" in status_of(run).why


def test_runs_that_publish_events_alone_still_have_an_end(run: Store) -> None:
    assert status_of(run).word == "unknown"
    assert detail(run, status_of(run))[2] == "attempt    1"
    with EventWriter(run, 1) as events:
        events.emit("run_start", name="demo", spec={})
        events.emit("run_end", status="interrupted", seconds=1.0)
    found = status_of(run)
    assert found.word == "stopped" and found.ended is not None
    assert time.time() - 60 < found.since <= found.ended
    assert "started" in detail(run, found)[2]


@pytest.mark.parametrize(
    ("ray", "word", "why"),
    [
        (RayJob("demo-1", "PENDING", "waiting for nodes", {}), "queued", "waiting for nodes"),
        (RayJob("demo-1", "FAILED", "no such image", {}), "failed", "no such image"),
        (RayJob("demo-1", "STOPPED", "", {}), "stopped", "Ray says STOPPED"),
        (None, "lost", "does not know the job demo-1 any more"),
    ],
)
def test_a_job_whose_driver_has_not_spoken(
    run: Store, monkeypatch: pytest.MonkeyPatch, ray: RayJob | None, word: str, why: str
) -> None:
    record(run, Submission(1, 1, "demo-1", "http://head:8265", "f" * 32, 0.0, {}))
    monkeypatch.setattr(module, "_ray_job", lambda last: (ray, ""))
    found = status_of(run)
    assert found.word == word and why in found.why
    assert found.submission is not None and found.submission.id == "demo-1"


def test_a_job_that_ray_has_ended_is_not_running(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(run, Submission(1, 0, "demo-1", "http://head:8265", "f" * 32, 0.0, {}))
    publish(run, START, STEP, job="demo-1", host="elsewhere")
    ended = RayJob("demo-1", "FAILED", "", {})
    monkeypatch.setattr(module, "_ray_job", lambda last: (ended, ""))
    assert status_of(run).word == "lost"
    monkeypatch.setattr(module, "_ray_job", lambda last: (None, "the cluster does not answer"))
    found = status_of(run)
    assert found.word == "running" and "does not answer" in found.why


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"status": "failed", "error": "a node died", "tries_left": 1}, "restarting"),
        ({"t": 1.0}, "waiting"),
    ],
)
def test_a_try_that_failed_is_not_the_end_of_a_job_that_lives(
    run: Store, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], word: str
) -> None:
    record(run, Submission(1, 0, "demo-1", "http://head:8265", "f" * 32, 0.0, {}))
    publish(run, START, STEP, job="demo-1", host="elsewhere")
    rewrite(run, **fields)
    alive = RayJob("demo-1", "RUNNING", "", {})
    monkeypatch.setattr(module, "_ray_job", lambda last: (alive, ""))
    found = status_of(run)
    assert found.word == word and found.live and "Ray says RUNNING" in found.why
    ended = RayJob("demo-1", "STOPPED", "", {})
    monkeypatch.setattr(module, "_ray_job", lambda last: (ended, ""))
    assert not status_of(run).live


def test_the_last_try_that_failed_is_the_end(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the moment before Ray has noticed."""
    record(run, Submission(1, 0, "demo-1", "http://head:8265", "f" * 32, 0.0, {}))
    publish(run, START, STEP, job="demo-1", tries_left=0, status="failed", error="disk full")
    alive = RayJob("demo-1", "RUNNING", "", {})
    monkeypatch.setattr(module, "_ray_job", lambda last: (alive, ""))
    found = status_of(run)
    assert (found.word, found.why, found.live) == ("failed", "disk full", False)


def test_of_a_job_that_is_queued_nothing_is_said_that_was_of_the_attempt_before(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(run, START, status="failed", error="disk full", ended=5.0)
    record(run, Submission(1, 1, "demo-1", "http://head:8265", "f" * 32, 7.0, {}))
    waits = RayJob("demo-1", "PENDING", "", {})
    monkeypatch.setattr(module, "_ray_job", lambda last: (waits, ""))
    found = status_of(run)
    assert (found.word, found.ended, found.host, found.since) == ("queued", None, None, 7.0)


def test_an_end_is_of_its_own_attempt(run: Store) -> None:
    with EventWriter(run, 1) as events:
        events.emit("run_end", status="interrupted", seconds=1.0)
    Attempt.claim(run)
    assert status_of(run).word == "unknown"


def test_a_later_local_attempt_is_not_mixed_with_the_job_before(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(run, Submission(1, 0, "demo-1", "http://head:8265", "f" * 32, 0.0, {}))
    publish(run, START, STEP)
    ended = RayJob("demo-1", "FAILED", "", {})
    monkeypatch.setattr(module, "_ray_job", lambda last: (ended, ""))
    assert status_of(run).word == "running" and status_of(run).submission is None


def test_the_last_line_of_a_failed_jobs_log_is_shown() -> None:
    message = (
        "Job entrypoint command failed with exit code 1, last available logs (truncated to "
        "20,000 chars):\nTraceback\n  File x\nModuleNotFoundError: No module named 'typer'\n"
    )
    assert module._shortly(message) == (
        "Job entrypoint command failed with exit code 1: "
        "ModuleNotFoundError: No module named 'typer'"
    )
    message = (
        "runtime_env setup failed: Failed to set up runtime environment.\n[Node 10.0.0.7] Traceback"
        "\n  File x\n    ERROR: No matching distribution found for hqq==9.0\n"
    )
    why = "packages could not be installed on node 10.0.0.7: No matching distribution found for hqq"
    assert module._shortly(message).startswith(why)


def test_lines_say_what_to_do_next(run: Store) -> None:
    publish(run, START, STEP)
    assert "stop       stillhouse stop demo" in detail(run, status_of(run))
    stopped = Status("stopped", "", 1)
    assert "continue   stillhouse run SPEC" in detail(run, stopped)
    assert plain(run, stopped)["status"] == "stopped"


def test_spans() -> None:
    assert [span(s) for s in (0, 59, 61, 3600, 7325)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 2 min",
    ]
