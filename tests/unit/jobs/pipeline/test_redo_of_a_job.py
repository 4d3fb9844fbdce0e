"""A submitted job is tried again with the same command: what it was to do anew is begun once."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.storage import open_store
from jobs.pipeline.pipeline import _left_to_redo
from jobs.run.directory import RunDir
from jobs.run.heartbeat import JOB


def test_redo_is_of_the_first_try_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(open_store(tmp_path))
    monkeypatch.setenv(JOB, "demo-1")
    run.claim(job="demo-1")
    run.finish("distill", {}, {}, 1.0)
    monkeypatch.setenv(JOB, "demo-2")
    assert _left_to_redo(run, "distill") == "distill"  # done by another job
    run.claim(job="demo-2")
    assert _left_to_redo(run, "distill") == "distill"  # the try was lost before it came to that
    run.forget("distill")
    run.claim(job="demo-2")
    assert _left_to_redo(run, "distill") is None
    assert _left_to_redo(run, "sweep") == "sweep"
    monkeypatch.delenv(JOB)
    assert _left_to_redo(run, "distill") == "distill"  # a user at a terminal means it
