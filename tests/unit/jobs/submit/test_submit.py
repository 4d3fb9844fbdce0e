"""What is kept of a sending, with the run and on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.storage import open_store
from jobs.cli.main import main
from jobs.errors import SpecErrors
from jobs.monitor.submissions import (
    Submission,
    job_id,
    last_submission,
    record,
    registry,
    remembered,
    take_back,
)
from jobs.submit import submit as module
from tests.fixtures import small_job


def sending(number: int) -> Submission:
    return Submission(number, 0, f"demo-{number}", "http://h:8265", "f", float(number), {})


def test_sendings_are_kept_in_order_and_the_run_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = open_store(tmp_path / "shared" / "demo")
    for number in (1, 2):
        assert record(run, sending(number))
    assert last_submission(run) == sending(2)
    assert not record(run, replace(sending(2), id="of another sender"))
    assert last_submission(run) == sending(2)
    take_back(run, sending(2))
    assert last_submission(run) == sending(1)
    assert remembered() == [run]
    (registry() / "torn.json").write_text('{"url": ')
    assert remembered() == [run]


def test_the_same_job_has_the_same_id() -> None:
    assert job_id("demo", "ab" * 16, 3) == "demo-abababab-3"


def test_values_of_variables_are_taken_from_here_and_never_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    monkeypatch.delenv("NOT_SET", raising=False)
    assert module.forwarded(["A_KEY"]) == {"A_KEY": "secret"}
    with pytest.raises(SpecErrors) as error:
        module.forwarded(["A_KEY=secret", "NOT_SET"])
    assert len(error.value.faults) == 2 and "secret" not in str(error.value)


def test_a_value_on_the_command_line_is_told_by_its_name_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(small_job.write_spec(small_job.teacher_spec(tmp_path), tmp_path))
    options = ["--address", "http://127.0.0.1:9", "--forward-env", "HF_TOKEN=abc-secret"]
    assert main(["submit", path, *options]) == 2
    said = capsys.readouterr()
    assert "HF_TOKEN=..." in said.err and "abc-secret" not in said.out + said.err
