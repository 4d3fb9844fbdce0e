"""The hook before a pod's end: the job is told once and waited for, within its time."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cluster import prestop

# Ends cleanly, a moment after it was asked to; says when it is ready to be asked.
JOB = """
import signal, sys, time
def stop(*_):
    time.sleep(0.3)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(600)
"""
pytestmark = pytest.mark.timeout(120)


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_the_job_is_asked_to_stop_and_waited_for() -> None:
    words = ["-c", JOB, "a-job"]
    with running(sys.executable, *words) as job:
        assert prestop.main(["--seconds", "600", "--", "python", *words]) == 0
        assert job.poll() == 130  # it has ended when the hook returns


def test_only_the_whole_command_is_the_job() -> None:
    with running(sys.executable, "-c", JOB, "one") as other:
        assert prestop.terminate(["python", "-c", JOB, "another"]) == []
        assert prestop.terminate(["python", "-c", JOB]) == []
        assert other.poll() is None


def test_a_job_that_does_not_stop_is_not_waited_for_longer() -> None:
    stubborn = JOB.replace("time.sleep(0.3)", "return")
    words = ["-c", f"{stubborn}time.sleep(600)\n", "stubborn"]
    with running(sys.executable, *words) as job:
        began = time.monotonic()
        prestop.main(["--seconds", "1", "--", "python", *words])
        assert time.monotonic() - began >= 1 and job.poll() is None


def test_a_worker_waits_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, True, False])
    monkeypatch.setattr(prestop, "ray_at_work", lambda: next(answers))
    monkeypatch.setattr(prestop, "POLL_S", 0.01)
    assert prestop.main(["--seconds", "30"]) == 0
    assert list(answers) == []


@pytest.mark.parametrize(
    ("title", "busy"),
    [
        ("ray::RayTrainWorker", True),
        ("ray::IDLE", False),
        ("ray::IDLE_SpillWorker", False),
        ("ray::DashboardAgent", False),
        ("ray::RuntimeEnvAgent", False),
        ("raylet", False),
        ("", False),
    ],
)
def test_what_ray_calls_its_work(monkeypatch: pytest.MonkeyPatch, title: str, busy: bool) -> None:
    class Process:
        def cmdline(self) -> list[str]:
            return [title] if title else []

    monkeypatch.setattr(prestop.psutil, "process_iter", lambda: iter([Process()]))
    assert prestop.ray_at_work() is busy


def test_a_process_that_vanishes_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def cmdline(self) -> list[str]:
            raise prestop.psutil.NoSuchProcess(1)

    monkeypatch.setattr(prestop.psutil, "process_iter", lambda: iter([Process()]))
    assert not prestop.ray_at_work() and prestop.terminate(["python"]) == []
