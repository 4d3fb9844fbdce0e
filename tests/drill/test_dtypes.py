"""`dtype: auto` on clusters whose nodes are not all fast at the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.fixtures import ray_clusters, small_job
from trainer.processor import cpu_dtype

pytestmark = pytest.mark.timeout(600)

WITHOUT_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}


def decided(address: str, folder: Path, name: str, *options: str, **env: str) -> str:
    """What a new run on the cluster trains in."""
    spec = small_job.teacher_spec(folder) | {"name": name}
    del spec["distill"]["dtype"]
    path = small_job.write_spec(spec, folder)
    command = ("run", str(path), "--address", address, "--until", "prepare", *options)
    code, out, err = small_job.stillhouse(*command, cwd=folder, RAY_AUTH_MODE="token", **env)
    assert code == 0, out + err
    dtype = yaml.safe_load(small_job.run_store(spec).read_text("spec.yaml"))["distill"]["dtype"]
    assert f"dtype: distill {dtype}" in out + err
    return dtype


def test_nodes_decide_and_differing_ones_take_what_all_are_fast_at(tmp_path: Path) -> None:
    cluster = ray_clusters.start(tmp_path)
    try:
        cluster.wait_for(1)
        # The machine that sends the job has no say.
        assert decided(cluster.gcs, tmp_path, "alike", **WITHOUT_BF16) == cpu_dtype()
        prefix = ["env", *(f"{name}={value}" for name, value in WITHOUT_BF16.items())]
        cluster.add("--num-cpus", "1", prefix=prefix)
        cluster.wait_for(2)
        assert decided(cluster.gcs, tmp_path, "mixed") == "float32"
        # The run keeps what it began with, whatever the nodes are now.
        cluster.others[0].kill()
        cluster.wait_for(1)
        assert decided(cluster.gcs, tmp_path, "mixed", "--redo", "prepare") == "float32"
    finally:
        cluster.end()
