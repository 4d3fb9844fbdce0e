"""W&B as a projection, read back with wandb's own reader."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml

from cluster.storage import Attempt, EventWriter, Store, open_store
from jobs.report.build import build_report
from jobs.report.run_data import load_run
from jobs.tracking import Follower, launch, project_run, writers
from jobs.tracking import launch as mode
from jobs.tracking import writers as publish
from jobs.tracking.wandb_runs import run_id, wandb_runs
from tests.fixtures.waiting import until

STEPS = 6
SPEC: dict[str, Any] = {
    "name": "tracked",
    "seed": 17,
    "teacher": {"model": "big"},
    "student": {"model": "tiny"},
    "data": {"sequence_length": 64},
    "distill": {"losses": {"forward_kl": 0.9, "ce": 0.1}, "steps": STEPS, "control": True},
}
MODELS = {"teacher": 4_000_000, "student": 400_000, "control": 400_000}
KEYS = {"capture", "distill", "control", "hqq-4b-g64", "hqq-2b-g64", "report"}


def steps(events: EventWriter, stage: str, first: int, last: int) -> None:
    for step in range(first, last + 1):
        events.emit("step", stage=stage, step=step, steps=STEPS, loss=10.0 - step, tokens=64 * step)


def tracked_run(root: Path) -> Store:
    """A finished run: capture, a training that was resumed, a control, two cells (one failed)."""
    run = open_store(root / "tracked")
    run.write_text("spec.yaml", yaml.safe_dump(SPEC))
    with EventWriter(run, Attempt.claim(run).number) as events:
        events.emit("run_start", name="tracked", spec=SPEC)
        for read in (0, 4, 8):
            events.emit("progress", stage="capture", done=read, total=8, unit="sequences")
        events.emit("capture_done", metrics={"bytes_per_token": {"train": 120.5}})
        steps(events, "distill", 1, 4)
    with EventWriter(run, Attempt.claim(run).number) as events:
        steps(events, "distill", 3, STEPS)
        events.emit(
            "training_done", stage="distill", metrics={"select_ce": 4.5, "nan": float("nan")}
        )
        steps(events, "control", 1, STEPS)
        events.emit("training_done", stage="control", metrics={"select_ce": 4.7})
        events.emit("run_end", status="done")
    for role, weights in MODELS.items():
        model: dict[str, Any] = {
            "name": f"{role}-model",
            "parameters": weights,
            "bytes": 2 * weights,
        }
        run.write_json(f"evaluations/{role}.json", {**model, "accuracy": 0.4, "perplexity": 90.0})
    done: dict[str, Any] = {
        "status": "done",
        "accuracy": 0.39,
        "retention": 97.5,
        "speedup": 0.4,
        "kernel": "int4",
    }
    failed = {"status": "failed", "error": "ValueError: 64 does not divide 96\nTraceback"}
    for bits, result in ((4, done), (2, failed)):
        quantized = {"bits": bits, "group_size": 64, "method": "hqq"}
        run.write_json(f"cells/hqq-{bits}b-g64/result.json", {"spec": quantized, **result})
    build_report(run)
    return run


@functools.cache  # a folder is never changed, only replaced under another name or file
def _inspect(file: Path, written_ns: int, options: tuple[str, ...]) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(file), "--json", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=400).stdout


def inspect(folder: Path, *options: str) -> str:
    (file,) = folder.glob("run-*.wandb")
    return _inspect(file, file.stat().st_mtime_ns, options)


def history(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in inspect(folder).splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def folders(run: Store, out: Path) -> dict[str, Path]:
    """The offline folder of each stage or cell, by key; fails where an id has several."""
    keys = {run_id(run.url, "tracked", key): key for key in KEYS}
    found = [(keys[path.name.rpartition("-")[2]], path) for path in out.glob("offline-run-*")]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.fixture(autouse=True)
def _no_wandb_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    root = tmp_path_factory.mktemp("projected")
    run = tracked_run(root)
    line = project_run(run.url, "offline", tags=["a", "b"], out_dir=root / "wandb")
    assert re.match(r"W&B offline: 6 runs written, 0 unchanged", line), line
    return run, root / "wandb"


def test_one_folder_per_stage_cell_and_report(projected: tuple[Store, Path]) -> None:
    run, out = projected
    found = folders(run, out)
    assert set(found) == KEYS
    for key, folder in found.items():
        assert folder.name.endswith(f"-{run_id(run.url, 'tracked', key)}")
        header = next(r["run"] for r in map(json.loads, inspect(folder).splitlines()) if "run" in r)
        kind = key if key in ("capture", "distill", "control", "report") else "cell"
        assert (header["run_group"], header["job_type"]) == ("tracked", kind)
        assert header["project"] == "stillhouse" and sorted(header["tags"]) == ["a", "b"]


def test_configs_are_flat_and_of_one_shape(projected: tuple[Store, Path]) -> None:
    found = {
        key: json.loads(inspect(folder, "--summary"))["config"]
        for key, folder in folders(*projected).items()
    }
    assert len({frozenset(config) for config in found.values()}) == 1
    cell = found["hqq-4b-g64"]
    assert not any(isinstance(value, dict | list) for value in cell.values())
    assert (cell["bits"], cell["group_size"], cell["method"]) == (4, 64, "hqq")
    assert (cell["teacher"], cell["student"]) == ("teacher-model", "student-model")
    assert (cell["student_params"], cell["losses"]) == (400_000, "forward_kl 0.9 + ce 0.1")
    assert found["control"]["losses"] == "ce"


def test_steps_are_logged_once_under_their_own_numbers_and_times(
    projected: tuple[Store, Path],
) -> None:
    run, out = projected
    rows = history(folders(run, out)["distill"])
    assert [(row["_step"], row["loss"]) for row in rows] == [(s, 10.0 - s) for s in range(1, 7)]
    happened = [e["t"] for e in load_run(run).of_kind("step") if e["stage"] == "distill"]
    assert [row["_timestamp"] for row in rows] == pytest.approx(happened, abs=1e-3)
    assert [row["_step"] for row in history(folders(run, out)["capture"])] == [0, 4, 8]


def test_results_are_in_the_summary_and_a_failed_cell_failed(
    projected: tuple[Store, Path],
) -> None:
    found = {
        key: json.loads(inspect(folder, "--summary")) for key, folder in folders(*projected).items()
    }
    good, bad = found["hqq-4b-g64"], found["hqq-2b-g64"]
    assert (good["state"], bad["state"]) == ("finished", "failed")
    assert (good["summary"]["retention"], good["summary"]["speedup"]) == (97.5, 0.4)
    assert bad["summary"]["error"] == "ValueError: 64 does not divide 96"
    assert found["distill"]["summary"]["select_ce"] == 4.5
    assert found["distill"]["summary"]["perplexity"] == 90.0
    assert found["capture"]["summary"]["bytes_per_token_train"] == 120.5


def test_report_run_holds_table_and_page(projected: tuple[Store, Path]) -> None:
    run, out = projected
    folder = folders(run, out)["report"]
    summary = json.loads(inspect(folder, "--summary"))["summary"]
    table = json.loads((folder / "files" / summary["headline"]["path"]).read_text())
    assert table["columns"][:3] == ["Model", "Technique", "Status"]
    assert len(table["data"]) == 5 and table["data"][3][1] == "hqq 4-bit g64"
    assert table["data"][3][table["columns"].index("Accuracy (%)")] == pytest.approx(39.0)
    page = (folder / "files" / summary["report"]["path"]).read_text()
    assert page == run.read_text("report/index.html")
    records = [json.loads(line) for line in inspect(folder).splitlines()]
    kept = next(r["artifact"]["manifest"]["contents"] for r in records if "artifact" in r)
    for entry in kept:  # `wandb sync` reads them: they live and die with the folders
        assert Path(entry["local_path"]).is_file() and out in Path(entry["local_path"]).parents


def test_again_rewrites_only_what_changed_and_replaces_its_folder(tmp_path: Path) -> None:
    run, out = tracked_run(tmp_path), tmp_path / "wandb"
    assert "6 runs written" in project_run(run.url, "offline", out_dir=out)
    before = folders(run, out)
    assert "0 runs written, 6 unchanged" in project_run(run.url, "offline", out_dir=out)
    result = run.read_json("cells/hqq-2b-g64/result.json")
    run.write_json("cells/hqq-2b-g64/result.json", {**result, "error": "OSError: another"})
    (out / ".stillhouse").joinpath(f"{index_name(run)}-staging-left").mkdir()  # of a killed one
    assert "1 runs written, 5 unchanged" in project_run(run.url, "offline", out_dir=out)
    after = folders(run, out)
    assert set(after) == KEYS
    summary = json.loads(inspect(after["hqq-2b-g64"], "--summary"))["summary"]
    assert summary["error"] == "OSError: another"
    assert {k: v for k, v in after.items() if k != "hqq-2b-g64"} == {
        k: v for k, v in before.items() if k != "hqq-2b-g64"
    }
    assert not list((out / ".stillhouse").glob("*staging*"))


def index_name(run: Store) -> str:
    return run_id(run.url, run.name, "index")


def test_a_run_is_replaced_only_when_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tracked_run(tmp_path), tmp_path / "wandb"
    where = publish.target("p", None, [])
    publish.publish(run, "offline", where, out)
    before = sorted(out.glob("offline-run-*"))

    def broken(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(writers, "_finish", broken)
    with pytest.raises(OSError, match="disk full"):
        publish.publish(run, "offline", publish.target("other", None, []), out)
    assert sorted(out.glob("offline-run-*")) == before


def test_follow_writes_cells_while_the_job_runs_and_ends_with_it(tmp_path: Path) -> None:
    whole, out = tracked_run(tmp_path / "whole"), tmp_path / "wandb"
    run = open_store(tmp_path / "live")
    run.write_text("spec.yaml", yaml.safe_dump(SPEC))
    attempt = Attempt.claim(run)
    with EventWriter(run, attempt.number, first_interval_s=0.1) as events:
        follower = Follower.start(run.url, "offline", out_dir=out, attempt=attempt.number)
        cell = "cells/hqq-4b-g64/result.json"
        run.write_bytes(cell, whole.read_bytes(cell))
        events.emit("cell_done", key="hqq-4b-g64", status="done")
        name = f"offline-run-*-{run_id(run.url, 'tracked', 'hqq-4b-g64')}"
        until(lambda: list(out.glob(name)))
        assert not list(out.glob(f"*{run_id(run.url, 'tracked', 'report')}"))
        steps(events, "distill", 1, 3)
        events.emit("run_end", status="failed")
    assert "3 runs written" in follower.finish(400)
    distill = folders(run, out)["distill"]
    assert json.loads(inspect(distill, "--summary"))["state"] == "failed"
    assert len(history(distill)) == 3


def test_live_curves_are_sent_once_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The online writer with a real client, whose settings are turned to offline."""
    real = writers.Target.settings

    def offline(self: writers.Target, *args: Any, **more: Any) -> wandb.Settings:
        settings = real(self, *args, **more)
        settings.mode, settings.resume = "offline", None
        return settings

    monkeypatch.setattr(writers.Target, "settings", offline)
    run, out = open_store(tmp_path / "live"), tmp_path / "wandb"
    run.write_text("spec.yaml", yaml.safe_dump(SPEC))
    events = EventWriter(run, Attempt.claim(run).number, first_interval_s=60)
    turns = iter(range(1, 100))

    def wait() -> bool:
        turn = next(turns)
        if turn <= 3:
            steps(events, "distill", 2 * turn - 1, 2 * turn)
            steps(events, "distill", 2 * turn - 1, 2 * turn)  # a replay changes nothing
        elif turn == 4:
            events.emit("training_done", stage="distill", metrics={"select_ce": 4.5})
        else:
            events.emit("run_end", status="done")
        events.flush()
        return True

    where = publish.target("p", None, [])
    publish.publish(run, "online", where, out, follow=wait)
    events.close()
    (folder,) = out.glob("offline-run-*")
    assert [(r["_step"], r["loss"]) for r in history(folder)] == [
        (s, 10.0 - s) for s in range(1, 7)
    ]
    assert json.loads(inspect(folder, "--summary"))["summary"]["select_ce"] == 4.5
    assert "0 runs written, 1 unchanged" in publish.publish(run, "online", where, out)


@pytest.mark.timeout(80)  # the client itself would wait for longer
def test_wandb_that_is_down_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tracked_run(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    line = project_run(run.url, "auto", out_dir=tmp_path / "wandb", timeout=3)
    assert line.startswith("W&B: ") and "\n" not in line


@pytest.mark.timeout(80)
def test_wandb_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = socket.create_server(("127.0.0.1", 0))  # accepts, never answers
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
    run = tracked_run(tmp_path)
    line = project_run(run.url, "online", out_dir=tmp_path / "wandb", timeout=2)
    listener.close()
    assert line.startswith("W&B: ") and "\n" not in line


def test_wandb_that_is_absent_or_broken_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken" / "wandb"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setattr(launch, "ROOT", f"{broken.parent}{os.pathsep}{launch.ROOT}")
    run = tracked_run(tmp_path)
    line = project_run(run.url, "offline", out_dir=tmp_path / "wandb")
    assert "broken on purpose" in line and "\n" not in line


def test_disabled_starts_nothing(tmp_path: Path) -> None:
    assert project_run("/nowhere", "disabled", out_dir=tmp_path / "wandb") == ""
    assert not (tmp_path / "wandb").exists()


def test_a_missing_run_costs_one_line(tmp_path: Path) -> None:
    line = project_run(str(tmp_path / "no"), "offline", out_dir=tmp_path / "wandb")
    assert "no run here" in line and "\n" not in line


def test_two_projections_of_one_run_at_once_leave_one_folder_each(tmp_path: Path) -> None:
    run, out = tracked_run(tmp_path), tmp_path / "wandb"
    lines: list[str] = []
    threads = [
        threading.Thread(target=lambda: lines.append(project_run(run.url, "offline", out_dir=out)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = sorted(lines)
    assert "0 runs written, 6 unchanged" in first and "6 runs written" in second
    assert set(folders(run, out)) == KEYS


@pytest.mark.parametrize(
    ("asked", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, "offline"),
        ("online", {"WANDB_MODE": "dryrun"}, "offline"),
        ("online", {"WANDB_MODE": "disabled"}, "disabled"),
        ("online", {"WANDB_DISABLED": "true"}, "disabled"),
        ("disabled", {"WANDB_MODE": "online"}, "disabled"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
    ],
)
def test_mode(asked: str, environment: dict[str, str], expected: str, tmp_path: Path) -> None:
    assert mode.resolve(asked, {"HOME": str(tmp_path), **environment}) == expected


def test_mode_auto_finds_a_login_in_netrc(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    (tmp_path / ".netrc").write_text("machine other.example login user password x\n")
    assert mode.resolve("auto", home) == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert mode.resolve("auto", home) == "online"
    assert mode.resolve("auto", {**home, "WANDB_BASE_URL": "https://w.example"}) == "offline"


def test_mode_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="tracking.mode: 'loud' is no mode; may be auto"):
        mode.resolve("loud", {})
    with pytest.raises(ValueError, match="WANDB_MODE"):
        mode.resolve("auto", {"WANDB_MODE": "loud"})


def test_environment_names_project_and_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_TAGS", "x, a")
    assert publish.target("stillhouse", "me", ["a"]) == writers.Target("mine", "me", ("a", "x"))


def test_a_resumed_run_gets_only_the_steps_that_follow(projected: tuple[Store, Path]) -> None:
    class Service:
        steps: list[int] = []

        def log(self, row: dict[str, float], step: int) -> None:
            self.steps.append(step)

    distill = next(t for t in wandb_runs(load_run(projected[0])) if t.key == "distill")
    service: Any = Service()
    assert writers._log(service, distill, 5) == 7 and service.steps == [5, 6]
    assert writers._log(service, distill, 7) == 7 and service.steps == [5, 6]


def test_ids_are_fixed_and_distinct() -> None:
    ids = [run_id(url, n, k) for url in "ab" for n in "cd" for k in ("distill", "hqq-4b-g64")]
    assert len(set(ids)) == 8 and all(re.fullmatch(r"[a-z0-9]{16}", one) for one in ids)
    assert run_id("s3://b/runs/x", "x", "distill") == "ac9327be8c9094e2"


def test_a_training_that_is_redone_is_not_complete(tmp_path: Path) -> None:
    run = open_store(tmp_path / "redone")
    with EventWriter(run, 1) as events:
        steps(events, "distill", 1, STEPS)
        events.emit("training_done", stage="distill", metrics={"select_ce": 4.5})
        events.emit("run_end", status="done")
    assert [t.complete for t in wandb_runs(load_run(run))] == [True]
    with EventWriter(run, 2) as events:
        steps(events, "distill", 1, 2)
    assert [t.complete for t in wandb_runs(load_run(run))] == [False]


def test_evaluations_are_in_the_history_and_the_newest_step_waits_for_its_own(
    tmp_path: Path,
) -> None:
    # W&B takes nothing more of a step that was sent.
    run = open_store(tmp_path / "tracked")
    every = {"distill": {"losses": {"forward_kl": 1.0}, "steps": STEPS, "evaluate_steps": 2}}
    run.write_text("spec.yaml", yaml.safe_dump({**SPEC, **every}))
    with EventWriter(run, Attempt.claim(run).number) as events:
        steps(events, "distill", 1, 4)
        events.emit("evaluation", stage="distill", step=2, select_ce=4.0, seconds=1.5)
        events.flush()
        history = wandb_runs(load_run(run))[0].history
        assert [step for step, _ in history] == [1, 2, 3]
        assert history[1][1]["select_ce"] == 4.0 and history[1][1]["evaluation_seconds"] == 1.5
        assert "select_ce" not in history[0][1]
        events.emit("evaluation", stage="distill", step=4, select_ce=3.0, seconds=1.5)
        events.flush()
        assert [step for step, _ in wandb_runs(load_run(run))[0].history] == [1, 2, 3, 4]
        steps(events, "distill", 5, 6)
        events.emit("run_end", status="failed")
        events.flush()
        # Nothing will come any more.
        assert [step for step, _ in wandb_runs(load_run(run))[0].history] == [1, 2, 3, 4, 5, 6]
