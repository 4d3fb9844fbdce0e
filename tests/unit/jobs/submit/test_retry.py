"""The entry point of a submitted job: which ends of a run are tried again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.submit import retry


@pytest.mark.parametrize(
    ("codes", "tries", "last"),
    [
        ([0], 3, 0),
        ([2], 3, 2),
        ([4], 3, 4),
        ([3, 0], 3, 0),
        ([-9, 3, 0], 3, 0),
        ([3, 3, 3], 3, 3),
        ([-9], 1, 137),
        ([3], 1, 3),
    ],
)
def test_lost_and_failed_runs_are_tried_again(
    monkeypatch: pytest.MonkeyPatch, codes: list[int], tries: int, last: int
) -> None:
    monkeypatch.setattr(retry, "REST_SECONDS", 0.0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    left, tries_left = list(codes), []

    def told(env: dict[str, str]) -> int:
        tries_left.append(int(env["STILLHOUSE_TRIES_LEFT"]))
        return left.pop(0)

    monkeypatch.setattr(retry.subprocess, "call", lambda command, env: told(env))
    assert retry.main([str(tries), "run", "spec.yaml"]) == last
    assert left == []
    assert tries_left == list(range(tries - 1, tries - 1 - len(codes), -1))


def test_a_stop_between_two_tries_is_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    calls: list[int] = []
    monkeypatch.setattr(retry.subprocess, "call", lambda command, env: calls.append(1) or 3)
    monkeypatch.setattr(retry.time, "sleep", lambda s: handlers[signal.SIGTERM](15, None))
    assert retry.main(["3", "run"]) == 130
    assert len(calls) == 1


def test_after_a_stop_there_is_no_other_try_and_ray_may_have_the_last_word(tmp_path: Path) -> None:
    """A run that ends with 130 by itself waits for Ray's signal, and is not run again."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("")
    body = "import pathlib, sys\npathlib.Path('ran').open('a').write('x')\nsys.exit(130)\n"
    (tmp_path / "jobs" / "__main__.py").write_text(body)
    entry = Path(retry.__file__)
    process = subprocess.Popen([sys.executable, str(entry), "3", "run"], cwd=tmp_path)
    while not (tmp_path / "ran").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 130
    assert (tmp_path / "ran").read_text() == "x"
