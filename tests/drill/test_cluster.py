"""The same job on a Ray cluster of two nodes that runs already, joined by its address."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import tiny  # noqa: E402

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A head and another node, one CPU each, as processes of this machine."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    if ray.is_initialized():
        ray.shutdown()
    cluster.shutdown()


def test_two_nodes_do_the_job_of_one(address: str, tmp_path: Path) -> None:
    teacher = tiny.write_spec(tiny.teacher_spec(tmp_path), tmp_path)
    code, out, err = tiny.stillhouse("run", str(teacher), "--address", address, cwd=tmp_path)
    assert code == 0, out + err
    spec = tiny.job_spec(tmp_path)
    path = str(tiny.write_spec(spec, tmp_path))
    code, out, err = tiny.stillhouse("run", path, "--address", address, cwd=tmp_path)
    assert code == 0, out + err
    rows = tiny.results(tiny.run_store(spec))
    assert [row["role"] for row in rows] == ["teacher", "student", "control"] + ["cell"] * 4
    assert all(row["status"] == "done" for row in rows)


def test_what_fits_on_no_node_is_refused_with_the_numbers(address: str, tmp_path: Path) -> None:
    path = str(tiny.write_spec(tiny.teacher_spec(tmp_path), tmp_path))
    code, _, err = tiny.stillhouse(
        "run", path, "resources.distill.cpus_per_worker=2", "--address", address, cwd=tmp_path
    )
    assert code == 2
    assert "workers of 2 CPUs and 0 GPUs do not fit" in err and "nodes: 1 CPUs" in err
