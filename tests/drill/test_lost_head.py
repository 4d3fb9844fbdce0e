"""The head of a cluster is lost, and with it the job: sent to a new cluster, it continues."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.storage import read_events  # noqa: E402
from tests.drill.test_jobs import CHECKPOINT_STEPS, World, slow, until  # noqa: E402
from tests.fixtures import ray_clusters, small_job  # noqa: E402

pytestmark = pytest.mark.timeout(1200)


def test_after_a_lost_head_the_job_that_is_sent_again_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    teacher = str(small_job.write_spec(small_job.teacher_spec(tmp_path, 1500), tmp_path))
    code, out, err = small_job.stillhouse("run", teacher, cwd=tmp_path)
    assert code == 0, out + err
    alone = {**slow(tmp_path), "name": "alone", "sweep": None}
    code, out, err = small_job.stillhouse(
        "run", str(small_job.write_spec(alone, tmp_path)), cwd=tmp_path
    )
    assert code == 0, out + err

    (tmp_path / "first").mkdir()
    with ray_clusters.cluster(tmp_path / "first") as first:
        world = World(tmp_path, first, small_job.run_store(alone))
        path, run, _ = world.job("head", sweep=None)
        code, out, err = world.submit(path)
        assert code == 0, out + err
        begun = until(run, lambda e: e["event"] == "training_start")
        until(run, lambda e: e["event"] == "step" and e["step"] >= CHECKPOINT_STEPS + 10)
        until(run, lambda e: e["event"] == "checkpoint")
        first.head.kill()
        reached = max(small_job.losses(run, "distill"))
        found = world.status(run)
        assert "does not answer" in found["why"], found
    (tmp_path / "second").mkdir()
    with ray_clusters.cluster(
        tmp_path / "second", port=first.port, dashboard=first.dashboard
    ) as second:
        world.rays = second
        found = world.status(run)
        assert found["status"] == "lost" and "submit it again" in found["why"], found
        code, out, err = world.submit(path, "--follow")
        assert code == 0, out + err
    (resumed,) = [e for e in read_events(run) if e["event"] == "resume"]
    assert resumed["step"] > 0 and reached - resumed["step"] <= CHECKPOINT_STEPS
    assert not set(begun["pids"]) & set(resumed["pids"])
    assert small_job.losses(run, "distill") == small_job.losses(world.undisturbed, "distill")
