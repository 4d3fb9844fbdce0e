"""Plan against actual in the report: what both know, side by side; nothing without a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.storage import EventWriter, Store, open_store
from jobs.forecast.forecast import record
from jobs.report.build import build_report
from jobs.report.page_details import TITLE, lines
from jobs.report.run_data import load_run
from jobs.spec.load import spec_of
from tests.fixtures.forecast_models import spec_data

CAPTURED = {
    "sequences": 900,
    "present": 0,
    "tokens": 3_686_400,
    "bytes": 90_000_000,
    "bytes_per_token": {"train": 20.0, "eval": 700.0},
    "peak_bytes": 30e9,
}


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """A run that ended, with its plan."""
    spec = spec_of(spec_data(tmp_path))
    store = open_store(tmp_path / "runs" / "big")
    plan = record(spec, [(64, 8), (64, 8)], "NVIDIA H200", 2e12)
    store.write_json("plan.json", plan)
    store.write_json("evaluations/student.json", {"role": "student", "bytes": 17e9})
    for key in ("hqq-8b-g64", "hqq-4b-g64"):
        store.write_json(f"cells/{key}/result.json", {"status": "done", "bytes": 6e9})
    with EventWriter(store, 1) as events:
        events.emit("run_start", name="big", spec=spec.model_dump(mode="json"))
        events.emit("capture_done", stage="capture", metrics=CAPTURED)
        _done(events, "capture", 5000.0, 80.0, **CAPTURED)
        events.emit("checkpoint", stage="distill", step=10, seconds=1.0, bytes=112e9)
        events.emit("training_done", stage="distill", metrics={"peak_bytes": 40e9})
        _done(events, "distill", 10000.0, 44.0)
    return store


def _done(events: EventWriter, stage: str, seconds: float, hours: float, **more: Any) -> None:
    metrics = {"device": "gpu", "device_hours": hours, **more}
    events.emit("stage_done", stage=stage, seconds=seconds, metrics=metrics)


def test_what_both_know_stands_side_by_side(run) -> None:
    plan = run.read_json("plan.json")
    found = {line.what: line for line in lines(load_run(run))}
    wanted = {
        "Cache, bytes per token": (plan["storage"]["cache"]["train_bytes_per_token"], 20.0),
        "Cache, bytes per held-out token": (
            plan["storage"]["cache"]["held_out_bytes_per_token"],
            700.0,
        ),
        "Cache": (plan["storage"]["cache"]["bytes"], 90e6),
        "Captured tokens": (plan["stages"]["capture"]["tokens"], 3_686_400),
        "Capture, time": (plan["stages"]["capture"]["seconds"], 5000.0),
        "Capture, device time": (plan["stages"]["capture"]["device_hours"], 80.0),
        "Capture, memory per worker": (plan["stages"]["capture"]["memory"]["total"], 30e9),
        "Distill, time": (plan["stages"]["distill"]["seconds"], 10000.0),
        "Distill, device time": (plan["stages"]["distill"]["device_hours"], 44.0),
        "Distill, memory per worker": (plan["stages"]["distill"]["memory"]["total"], 40e9),
        "A checkpoint": (plan["storage"]["checkpoint"], 112e9),
        "Student": (plan["storage"]["student"], 17e9),
        "Cells": (plan["storage"]["cells"], 12e9),
    }
    assert {what: (line.planned, line.actual) for what, line in found.items()} == wanted
    line = found["Student"]
    assert line.ratio == f"{17e9 / line.planned:.2f}"


def test_page_and_table_have_it(run) -> None:
    build_report(run)
    page, table = run.read_text("report/index.html"), run.read_text("report/table.md")
    assert f"<h2>{TITLE}</h2>" in page and "Cache, bytes per held-out token" in page
    assert f"## {TITLE}" in table and "| Student | 16,061 MB | 17,000 MB | 1.06 |" in table


@pytest.mark.parametrize("plan", [None, {"format": 1, "name": "big", "faults": ["gone"]}])
def test_without_a_plan_there_is_no_section(run, plan) -> None:
    run.delete("plan.json")
    if plan is not None:
        run.write_json("plan.json", plan)
    build_report(run)
    assert TITLE not in run.read_text("report/index.html")
    assert TITLE not in run.read_text("report/table.md")


def test_what_others_captured_is_not_compared(run) -> None:
    with EventWriter(run, 2) as events:
        events.emit("capture_done", stage="capture", metrics={**CAPTURED, "present": 5})
    found = {line.what for line in lines(load_run(run))}
    assert "Cache" not in found and "Cache, bytes per token" in found
