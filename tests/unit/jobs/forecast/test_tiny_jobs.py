"""A job so small that its work is no part of a second still has a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.forecast.forecast import record
from jobs.spec.load import load_spec
from tests.fixtures import forecast_models, small_job


@pytest.mark.parametrize("nodes", [[(1, 0)] * 5, [(2, 0)]])
def test_a_tiny_job_has_a_plan(tmp_path: Path, nodes: list[tuple[int, int]]) -> None:
    spec = small_job.job_spec(tmp_path)
    spec["teacher"]["model"] = forecast_models.folder_of(
        small_job.model(64, 2), tmp_path / "teacher"
    )
    found = record(load_spec(small_job.write_spec(spec, tmp_path)), nodes, host_memory=16e9)
    assert found["fits"] and found["break_even"]["cached_teacher_hours"] > 0, found
