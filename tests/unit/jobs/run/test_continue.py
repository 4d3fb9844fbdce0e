"""What a run that ended early says of how to go on: the command of the one who reads it."""

from __future__ import annotations

import sys

import pytest

from jobs.pipeline.pipeline import _command
from jobs.run.heartbeat import JOB
from jobs.spec.job import JobSpec


def test_it_is_the_command_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = JobSpec.model_construct(name="first")
    monkeypatch.delenv(JOB, raising=False)
    monkeypatch.setattr(sys, "argv", ["stillhouse", "run", "a.yaml", "seed=2"])
    assert _command(spec) == "stillhouse run a.yaml seed=2"
    monkeypatch.setattr(sys, "argv", ["jobs"])
    assert _command(spec) == "run of first"


def test_of_a_job_that_was_sent_it_is_no_command_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(JOB, "first-0123-1")
    monkeypatch.setattr(sys, "argv", ["jobs", "run", "stillhouse-job.yaml", "--address", "auto"])
    told = _command(JobSpec.model_construct(name="first"))
    assert "stillhouse submit" in told and "stillhouse-job" not in told
