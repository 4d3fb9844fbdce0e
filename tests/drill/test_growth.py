"""A cluster that is too small grows for a job, and shrinks after it: Ray's own autoscaler."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.ray_jobs import RayJobs  # noqa: E402
from cluster.storage import read_events  # noqa: E402
from tests.drill.test_jobs import ROOT, World  # noqa: E402
from tests.fixtures import autoscaling, ray_clusters, small_job  # noqa: E402
from tests.fixtures.ranks import free_port  # noqa: E402

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ray_clusters.Rays]:
    """A head of one CPU; the autoscaler starts nodes of one CPU on this machine, at most three."""
    from ray.util import get_node_ip_address

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    port = free_port()
    path = tmp_path / "autoscaler.yaml"
    gcs = f"{get_node_ip_address()}:{port}"
    path.write_text(json.dumps(autoscaling.configuration(gcs, tmp_path, most=3)))
    more = {
        "port": port,
        "PYTHONPATH": str(ROOT),  # for the autoscaler
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    options = ["--autoscaling-config", str(path)]
    with ray_clusters.cluster(tmp_path, nodes=0, options=options, **more) as cluster:
        yield cluster


def test_a_cluster_grows_for_a_job_and_shrinks_after_it(
    growing: ray_clusters.Rays, tmp_path: Path
) -> None:
    spec = {**small_job.teacher_spec(tmp_path), "name": "large"}
    spec["resources"] = {"distill": {"workers": 2, "cpus_per_worker": 1}}
    run = small_job.run_store(spec)
    world = World(tmp_path, growing, run)
    code, out, err = world.submit(str(small_job.write_spec(spec, tmp_path)))
    assert code == 2 and "resources.distill" in err and not run.exists("state"), out + err
    spec["resources"]["growth_minutes"] = 3
    code, out, err = world.submit(str(small_job.write_spec(spec, tmp_path)), "--follow")
    assert code == 0, out + err
    assert "waiting for the cluster to grow: resources.distill" in out, out
    (began,) = [e for e in read_events(run) if e["event"] == "training_start"]
    assert len(set(began["pids"])) == 2
    assert len(RayJobs(growing.address).nodes()) == 2
    growing.wait_for(1, 120)


def test_what_a_stopped_job_asked_for_holds_no_longer_than_it(
    growing: ray_clusters.Rays, tmp_path: Path
) -> None:
    """The job is too large for what the cluster may become."""
    spec = {**small_job.teacher_spec(tmp_path), "name": "too-large"}
    spec["resources"] = {"distill": {"workers": 9, "cpus_per_worker": 1}, "growth_minutes": 10}
    run = small_job.run_store(spec)
    world = World(tmp_path, growing, run)
    code, out, err = world.submit(str(small_job.write_spec(spec, tmp_path)))
    assert code == 0, out + err
    growing.wait_for(4, 120)
    ends = time.monotonic() + 60
    while "only 4 do" not in (found := world.status(run))["why"]:  # it looks now and then
        assert found["status"] == "waiting" and time.monotonic() < ends, found
    code, out, err = small_job.stillhouse("stop", run.url, cwd=tmp_path)
    assert code == 0, out + err
    assert world.wait(run)["status"] == "stopped"
    growing.wait_for(1, 120)
