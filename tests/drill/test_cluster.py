"""The same job on a Ray cluster of two nodes that runs already, joined by its address."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.storage import read_events  # noqa: E402
from tests.fixtures import small_job  # noqa: E402

pytestmark = pytest.mark.timeout(900)


@dataclass
class Nodes:
    """A head and another node, one CPU each, as processes of this machine."""

    cluster: Any
    other: Any

    def lose_the_other(self, pids: list[int]) -> None:
        """Kills that node, and those of the processes `pids` that live on it."""
        raylet = self.other.all_processes["raylet"][0].process.pid
        theirs = [process for pid in pids if (process := psutil.Process(pid)).ppid() == raylet]
        assert len(theirs) == 1
        self.cluster.remove_node(self.other, allow_graceful=False)
        for process in theirs:  # else it lives on for several seconds
            process.kill()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield Nodes(cluster, cluster.add_node(num_cpus=1))
    if ray.is_initialized():
        ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def address(nodes: Nodes) -> str:
    return nodes.cluster.address


def test_two_nodes_do_the_job_of_one(address: str, tmp_path: Path) -> None:
    teacher = small_job.write_spec(small_job.teacher_spec(tmp_path), tmp_path)
    code, out, err = small_job.stillhouse("run", str(teacher), "--address", address, cwd=tmp_path)
    assert code == 0, out + err
    spec = small_job.job_spec(tmp_path)
    path = str(small_job.write_spec(spec, tmp_path))
    code, out, err = small_job.stillhouse("run", path, "--address", address, cwd=tmp_path)
    assert code == 0, out + err
    rows = small_job.results(small_job.run_store(spec))
    assert [row["role"] for row in rows] == ["teacher", "student", "control"] + ["cell"] * 4
    assert all(row["status"] == "done" for row in rows)


def test_what_fits_on_no_node_is_refused_with_the_numbers(address: str, tmp_path: Path) -> None:
    path = str(small_job.write_spec(small_job.teacher_spec(tmp_path), tmp_path))
    code, _, err = small_job.stillhouse(
        "run", path, "resources.distill.cpus_per_worker=2", "--address", address, cwd=tmp_path
    )
    assert code == 2
    assert "workers of 2 CPUs and 0 GPUs do not fit" in err and "nodes: 1 CPUs" in err


def elastic_spec(folder: Path, storage: str) -> dict[str, Any]:
    """Plain training on one or two workers, long enough for a node to be lost in its middle."""
    spec = small_job.teacher_spec(folder)
    distill = {
        **spec["distill"],
        "steps": 120,
        "checkpoint_steps": 10,
        "learning_rate": 3e-4,
        "weight_decay": 0.3,
    }
    spec |= {"name": "elastic", "storage": str(folder / storage), "distill": distill}
    spec["student"] = {"init": "random", "config": small_job.model(128, 4)}
    spec["resources"] = {"distill": {"workers": [1, 2]}}
    return spec


def test_a_lost_node_leaves_a_smaller_group_that_goes_on(nodes: Nodes, tmp_path: Path) -> None:
    """Last of its file: the node does not come back. Compared with torchrun's two ranks."""
    spec = elastic_spec(tmp_path, "alone")
    alone = small_job.run_store(spec)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "trainer"]
    command.append(str(small_job.write_spec(spec, tmp_path)))
    root = str(Path(__file__).resolve().parents[2])
    environment = small_job.environment(CUDA_VISIBLE_DEVICES="", PYTHONPATH=root)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    spec = elastic_spec(tmp_path, "elastic")
    run = small_job.run_store(spec)
    path = str(small_job.write_spec(spec, tmp_path))
    process = small_job.start("run", path, "--address", nodes.cluster.address, cwd=tmp_path)
    small_job.wait_for(run, lambda e: e["event"] == "step" and 25 <= e["step"] < 90, process)

    def find(kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(run) if event["event"] == kind]

    (launch,), (begun,) = find("launch"), find("training_start")
    assert (launch["fewest"], launch["workers"]) == (1, 2) and begun["world"] == 2
    nodes.lose_the_other(begun["pids"])
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, out + error
    (resumed,) = find("resume")
    assert resumed["world"] == 1 and resumed["saved_by"] == 2 and resumed["step"] >= 20
    (stage,) = [e for e in find("stage_done") if e["stage"] == "distill"]
    assert stage["metrics"]["distill"]["world"] == 1 and stage["metrics"]["device_hours"] > 0
    found, wanted = small_job.losses(run, "distill"), small_job.losses(alone, "distill")
    assert sorted(found) == sorted(wanted) == list(range(1, 121))
    values = [
        [float.fromhex(losses[step]) for step in sorted(losses)] for losses in (found, wanted)
    ]
    np.testing.assert_allclose(*values, rtol=1e-4)
    assert values[0][-1] < values[0][0] - 0.3  # it learns: equality is of something
