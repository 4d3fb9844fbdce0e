"""What the fan-out itself costs: empty tasks over ten nodes that are processes of this machine.

python -m tests.bench.sweep_fanout      # prints JSON
"""

from __future__ import annotations

import json
import os
import statistics
import time
from typing import Any

import psutil

from cluster.fanout import Failure, FanOut
from cluster.resources import ResourceRequest

NODES = 10


def measure() -> dict[str, Any]:
    """The costs of empty tasks, once the nodes are up.

    nodes_up_s: how long ten nodes took to come up. empty_cells_1000_s: 1,000 tasks, the start of
    Ray's workers included. s_per_cell: seconds per task of 100 (median of five times) and of 2,000,
    on workers that are up. driver_rss_mb: resident memory of this process, in MB, before the first
    task and after 100, 1,000 and 2,000 more.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    began = time.perf_counter()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        ray.init(address=cluster.address, log_to_driver=False)
        up = time.perf_counter() - began
        memory = {"0": _resident()}
        thousand = _empty(1000)
        memory["1000"] = _resident()
        hundred = statistics.median(_empty(100) for _ in range(5))
        memory["100"] = _resident()
        many = _empty(2000)
        memory["2000"] = _resident()
    finally:
        ray.shutdown()
        cluster.shutdown()
    return {
        "nodes_up_s": round(up, 1),
        "empty_cells_1000_s": round(thousand, 2),
        "s_per_cell": {"100": round(hundred / 100, 5), "2000": round(many / 2000, 5)},
        "driver_rss_mb": {key: round(memory[key], 1) for key in ("0", "100", "1000", "2000")},
    }


def _nothing(index: int) -> int:
    return index


def _empty(count: int) -> float:
    """Seconds for so many tasks that do nothing. Raises AssertionError if one is lost."""
    began = time.perf_counter()
    pool = FanOut(_nothing, need=ResourceRequest(1))
    for index in range(count):
        pool.add(f"cell/{index}", index)
    found = 0
    for key, result in pool:
        assert not isinstance(result, Failure) and key == f"cell/{result}", (key, result)
        found += 1
    assert found == count
    return time.perf_counter() - began


def _resident() -> float:
    """Resident memory of this process in MB."""
    return psutil.Process().memory_info().rss / 1e6


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
