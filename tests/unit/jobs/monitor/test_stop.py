"""`stillhouse stop` and its neighbours, on runs whose driver is a heartbeat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.storage import Attempt, Store, open_store
from jobs.cli.main import main
from jobs.errors import SpecErrors
from jobs.monitor import stop as module
from jobs.monitor.stop import stop_run
from jobs.run.heartbeat import Heartbeat
from jobs.run.requests import Asked, asked


class Driver:
    """A run that trains; `obeys` decides at every look of the waiting command what it does."""

    def __init__(self, run: Store) -> None:
        Attempt.claim(run)
        self.run, self.heartbeat = run, Heartbeat(run, 1)
        self.heartbeat.event({"event": "stage_start", "stage": "distill"})
        self.heartbeat.update()
        self.heartbeat._publish()
        self.obeys: Callable[[Asked], bool] = lambda asked: asked.stop
        self.clock = 1000.0

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
        if self.obeys(asked(self.run, 1)):
            self.heartbeat.end("stopped")
            self.heartbeat._publish()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    made = Driver(open_store(tmp_path / "runs" / "demo"))
    monkeypatch.setattr(module.time, "sleep", made.sleep)
    monkeypatch.setattr(module.time, "monotonic", lambda: made.clock)
    return made


def test_a_run_is_asked_and_waited_for(driver: Driver) -> None:
    said: list[str] = []
    end = stop_run(driver.run, 60, False, said.append)
    assert end.word == "stopped" and asked(driver.run, 1) == Asked(stop=True)
    assert len(said) == 1 and said[0].startswith("demo: asked to stop")


def test_what_does_not_stop_in_time_is_told_and_goes_on(driver: Driver) -> None:
    driver.obeys = lambda asked: False
    with pytest.raises(SpecErrors, match="--force"):
        stop_run(driver.run, 5, False, lambda line: None)
    assert asked(driver.run, 1) == Asked(stop=True)


def test_force_ends_it_after_the_wait(driver: Driver) -> None:
    driver.obeys = lambda asked: asked.kill
    assert stop_run(driver.run, 5, True, lambda line: None).word == "stopped"
    assert asked(driver.run, 1) == Asked(stop=True, kill=True)


def test_what_has_ended_cannot_be_stopped(driver: Driver) -> None:
    driver.heartbeat.end("done")
    driver.heartbeat._publish()
    with pytest.raises(SpecErrors, match="demo: is not under way: done"):
        stop_run(driver.run, 5, False, lambda line: None)
    assert asked(driver.run, 1) == Asked()


def test_the_commands_say_how_runs_are(driver: Driver, capsys: pytest.CaptureFixture[str]) -> None:
    storage = ["--storage", str(Path(driver.run.url).parent)]
    assert main(["status", "demo", "--json", *storage]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "running"
    assert main(["list", *storage]) == 0
    assert "demo" in capsys.readouterr().out
    assert main(["stop", "demo", *storage]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "demo: stopped"
    assert main(["list", "--json", *storage]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], found["status"]) == ("demo", "stopped")
    assert main(["status", "demo", *storage]) == 0
    assert "stopped" in capsys.readouterr().out
    assert main(["watch", "demo", *storage]) == 130
    assert main(["stop", "demo", *storage]) == 2
    assert main(["logs", "demo", *storage]) == 0
