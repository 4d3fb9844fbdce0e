"""A run in a bucket, looked at from elsewhere while it works."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fixtures import small_job  # noqa: E402
from tests.fixtures.s3 import point_to, s3_server  # noqa: E402

pytestmark = pytest.mark.timeout(600)


def test_a_run_in_a_bucket_is_followed_from_another_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "fetched"))
    with s3_server() as endpoint:
        point_to(endpoint, monkeypatch)
        spec = {**small_job.teacher_spec(tmp_path), "storage": "s3://bucket/runs", "name": "far"}
        run = small_job.run_store(spec)
        job = small_job.start("run", str(small_job.write_spec(spec, tmp_path)), cwd=tmp_path)
        small_job.wait_for(run, lambda event: event["event"] == "stage_start", job)
        reader = small_job.start("logs", run.url, "-f", cwd=tmp_path)
        code, found, err = small_job.stillhouse("status", run.url, "--json", cwd=tmp_path)
        assert code == 0 and json.loads(found)["status"] in ("waiting", "running"), found + err
        out, err = job.communicate(timeout=400)
        assert job.returncode == 0, out + err
        followed, err = reader.communicate(timeout=60)  # by itself, when the run has ended
        assert reader.returncode == 0, err
        code, whole, err = small_job.stillhouse("logs", run.url, cwd=tmp_path)
        assert code == 0 and followed == whole, err
        assert len([name for name in run.list("logs") if name.endswith(".txt")]) > 1
        (log,) = Path(out.split(", log ")[1].split("\n")[0]).parent.glob("*.log")
        assert whole == log.read_text()
        code, found, err = small_job.stillhouse("list", "--storage", spec["storage"], cwd=tmp_path)
        assert code == 0 and "far" in found and "done" in found, found + err
