"""Two drivers of one run: the older one sleeps, wakes up after the newer has ended, and publishes
nothing. On files and on S3."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.storage import Store, read_events  # noqa: E402
from tests.fixtures import small_job  # noqa: E402
from tests.fixtures.s3 import point_to, s3_server  # noqa: E402

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(params=["files", "s3"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    if request.param == "files":
        yield str(tmp_path / "runs")
        return
    with s3_server() as endpoint:
        point_to(endpoint, monkeypatch)
        monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        yield "s3://bucket/fenced"


def results(run: Store) -> dict[str, str]:
    """Hashes of all that a run gives; not what each attempt says of itself."""
    own = ("events/", "logs/", "plan.json")
    own += tuple(f"state/{name}/" for name in ("live", "attempts", "requests", "launches"))
    return {
        name: hashlib.sha256(run.read_bytes(name)).hexdigest()
        for name in run.glob("**")
        if not name.startswith(own)
    }


def test_an_attempt_that_wakes_up_publishes_nothing(storage: str, tmp_path: Path) -> None:
    spec = small_job.teacher_spec(tmp_path, 1500)
    distill = {**spec["distill"], "steps": 150, "checkpoint_steps": 10}
    spec |= {"name": "fenced", "storage": storage, "distill": distill}
    spec["student"] = {"init": "random", "config": small_job.model(128, 4)}
    path, run = str(small_job.write_spec(spec, tmp_path)), small_job.run_store(spec)
    old = small_job.start("run", path, cwd=tmp_path)

    def find(kind: str, attempt: int) -> list[dict[str, Any]]:
        found = read_events(run)
        return [e for e in found if e["event"] == kind and e["attempt"] == attempt]

    small_job.wait_for(run, lambda e: e["event"] == "checkpoint" and e["step"] >= 20, old)
    asleep = [old.pid, *find("training_start", 1)[0]["pids"]]
    for pid in asleep:
        os.kill(pid, signal.SIGSTOP)

    code, out, err = small_job.stillhouse("run", path, cwd=tmp_path)
    assert code == 0, out + err
    assert find("resume", 2)[0]["step"] >= 20
    before = results(run)
    assert any(name.startswith("student/") for name in before)

    for pid in asleep:
        os.kill(pid, signal.SIGCONT)
    out, err = old.communicate(timeout=300)
    assert old.returncode == 4, out + err
    assert "superseded by attempt 2" in err and "the newer attempt goes on" in err
    assert results(run) == before
    assert not find("training_done", 1)
