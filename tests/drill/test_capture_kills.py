"""A capture on a cluster that loses a worker, or its driver, and is continued by 1 or 3 workers.

What the cache holds in the end is, byte for byte, what an undisturbed capture of two workers puts
there: records do not depend on who made them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.storage import open_store, read_events  # noqa: E402
from tests.fixtures import small_job  # noqa: E402
from tests.fixtures.corpora import stored_records  # noqa: E402

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of three CPUs, as processes of this machine; it outlives its drivers."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    yield cluster.address
    if ray.is_initialized():
        ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, address: str) -> Path:
    """Where a teacher is that takes long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("kills")
    spec = small_job.teacher_spec(folder, documents=4000)
    spec["student"] = {"init": "random", "config": small_job.model(256, 8)}
    path = str(small_job.write_spec(spec, folder))
    code, out, err = small_job.stillhouse("run", path, "--address", address, cwd=folder)
    assert code == 0, out + err
    return folder


def job(folder: Path, storage: str, workers: int = 2) -> dict[str, Any]:
    """A capture in small pieces on so many workers of one CPU."""
    return small_job.job_spec(
        folder,
        documents=4000,
        storage=str(folder / storage),
        cache={"method": "sample", "draws": 20, "redraws": 2},
        distill__losses={"forward_kl": 1.0},
        distill__steps=150,  # two epochs of 600 sequences
        data__max_tokens=600 * 64,
        resources__capture={
            "workers": workers,
            "cpus_per_worker": 1,
            "batch_tokens": 128,
            "shard_seconds": 0.05,
        },
    )


def arguments(spec: dict[str, Any], folder: Path, address: str) -> list[str]:
    """The command that captures and stops."""
    path = str(small_job.write_spec(spec, folder))
    return ["run", path, "--until", "capture", "--address", address]


def under_way(event: dict[str, Any]) -> bool:
    """Whether the event says that the capture is in the middle."""
    return event["event"] == "progress" and 20 <= event["done"] < event["total"] - 40


def content(spec: dict[str, Any]) -> dict[tuple[str, bytes], set[bytes]]:
    """The stored bytes of every record of the job's one cache, by kind and key."""
    caches = open_store(spec["storage"]).sub("_logits")
    (name,) = caches.list()
    return {key: set(blobs) for key, blobs in stored_records(caches.sub(name)).items()}


@pytest.fixture(scope="module")
def undisturbed(folder: Path, address: str) -> dict[tuple[str, bytes], set[bytes]]:
    spec = job(folder, "undisturbed")
    code, out, err = small_job.stillhouse(*arguments(spec, folder, address), cwd=folder)
    assert code == 0, out + err
    found = content(spec)
    assert {kind for kind, _ in found} == {"train", "train1", "eval"}
    assert all(len(blobs) == 1 for blobs in found.values())
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_driver_is_followed_by_more_or_fewer_workers(
    folder: Path, address: str, undisturbed: dict[tuple[str, bytes], set[bytes]], workers: int
) -> None:
    spec = job(folder, f"driver-{workers}")
    run = small_job.run_store(spec)
    process = small_job.start(*arguments(spec, folder, address), cwd=folder)
    small_job.wait_for(run, under_way, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)

    spec = job(folder, f"driver-{workers}", workers)
    code, out, err = small_job.stillhouse(*arguments(spec, folder, address), cwd=folder)
    assert code == 0, out + err
    first, second = (e for e in read_events(run) if e["event"] == "capture_start")
    assert len(first["pids"]) == 2 and len(second["pids"]) == workers
    assert second["present"] > 0 and second["missing"] > 0
    assert content(spec) == undisturbed


def test_a_killed_worker_is_replaced_within_the_run(
    folder: Path, address: str, undisturbed: dict[tuple[str, bytes], set[bytes]]
) -> None:
    spec = job(folder, "worker")
    run = small_job.run_store(spec)
    process = small_job.start(*arguments(spec, folder, address), cwd=folder)
    small_job.wait_for(run, under_way, process)
    (start,) = (e for e in read_events(run) if e["event"] == "capture_start")
    os.kill(start["pids"][1], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    first, second = (e for e in read_events(run) if e["event"] == "capture_start")
    assert first["attempt"] == second["attempt"] == 1
    assert second["present"] > 0 and not set(first["pids"]) & set(second["pids"])
    assert content(spec) == undisturbed
