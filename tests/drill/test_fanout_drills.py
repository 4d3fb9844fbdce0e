"""The fan-out while nodes and memory go: the others finish, failures say what happened.

Every task leaves a line in a file when it begins and one when it ends, so that what ran, how often
and whether twice at once is read from the disk, not from what the driver believes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.fanout import Failure, FanOut
from cluster.resources import ResourceRequest

pytestmark = pytest.mark.timeout(400)


def work(folder: Path, key: str, what: str = "", seconds: float = 0) -> str:
    """A task that writes when it begins and ends, and may raise, hang or take all memory."""
    mark(folder, key, "began")
    if what == "raise":
        raise ValueError(f"{key} is wrong")
    if what == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "balloon":
        held = []
        for _ in range(240):  # 12 GB: far above what is allowed
            held.append(b"x" * (50 << 20))
            time.sleep(0.03)
    time.sleep(seconds)
    mark(folder, key, "ended")
    return key


def mark(folder: Path, key: str, word: str) -> None:
    with open(folder / f"{key}.{word}", "a") as file:
        file.write(f"{os.getpid()} {time.time()}\n")


def marks(folder: Path, key: str, word: str) -> list[tuple[int, float]]:
    """Process and time of each attempt that began, or ended."""
    path = folder / f"{key}.{word}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.split()[0]), float(line.split()[1])) for line in lines]


@contextmanager
def nodes(head: int, *others: int) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster of nodes with so many CPUs each, as processes of this machine."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head})
    try:
        added = [cluster.add_node(num_cpus=cpus) for cpus in others]
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster, added
    finally:
        ray.shutdown()
        cluster.shutdown()


def lose(node: Any) -> set[int]:
    """SIGKILL to a node's raylet and to all its processes; returns their ids."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    processes = [raylet, *raylet.children(recursive=True)]
    for process in processes:
        process.kill()
    return {process.pid for process in processes}


def test_a_node_is_lost_among_tasks_that_raise_and_hang(tmp_path: Path) -> None:
    retried: dict[str, str] = {}
    with nodes(1, 1, 1) as (_, others):
        pool = FanOut(
            work,
            need=ResourceRequest(1),
            limit_s=15,
            on_retry=lambda key, why, attempt: retried.update({key: why}),
        )
        keys = [f"good{index}" for index in range(20)]
        pool.add("raise", tmp_path, "raise", "raise", priority=1)
        pool.add("hang", tmp_path, "hang", "hang", priority=1)
        for key in keys:
            pool.add(key, tmp_path, key, "", 1.5)
        pool.add("behind", tmp_path, "behind", after=keys[-2:])
        pool.add("never", tmp_path, "never", after=("hang",))
        found: dict[str, Any] = {}
        gone: set[int] = set()
        for key, result in pool:
            found[key] = result
            for node in others:  # one that the task that hangs is not on
                if not gone and len(found) >= 4 and runs_on(tmp_path, keys, node):
                    gone = lose(node)
    assert gone
    assert {key: found[key] for key in keys} == {key: key for key in keys}
    assert found["behind"] == "behind"
    assert (found["raise"].error, found["raise"].kind) == ("ValueError: raise is wrong", "error")
    assert (found["hang"].error, found["hang"].kind) == ("took longer than 0.25 minutes", "time")
    assert found["never"].error == "not started: hang failed" and len(found) == 24
    again = [key for key in keys if len(marks(tmp_path, key, "began")) == 2]
    assert again and set(again) <= set(retried)
    for key in keys:
        began, ended = marks(tmp_path, key, "began"), marks(tmp_path, key, "ended")
        assert len(ended) == 1 and len(began) == (2 if key in again else 1)
        if key in again:  # the first was on the node that went, and dead before the second began
            assert began[0][0] in gone and ended[0][0] not in gone
    assert len(marks(tmp_path, "hang", "began")) == 1


def runs_on(folder: Path, keys: list[str], node: Any) -> bool:
    """Whether one of the tasks, of 1.5 s, has just begun on that node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    there = {process.pid for process in raylet.children()}
    return any(
        pid in there
        for key in keys
        for pid, began in marks(folder, key, "began")
        if time.time() - began < 0.8 and not marks(folder, key, "ended")
    )


def test_what_only_the_lost_node_could_hold_fails_with_the_numbers(tmp_path: Path) -> None:
    with nodes(1, 2) as (_, (other,)):
        pool = FanOut(work, need=ResourceRequest(1), timeout_s=5)
        for index in range(4):
            pool.add(f"wide{index}", tmp_path, f"wide{index}", "", 600, need=ResourceRequest(2))
        pool.add("small0", tmp_path, "small0", "", 1)
        found: dict[str, Any] = {}
        for key, result in pool:
            found[key] = result
            if key == "small0":
                wait_for(lambda: marks(tmp_path, "wide0", "began") != [])
                lose(other)
                lost = time.monotonic()
        assert time.monotonic() - lost < 90
    assert found.pop("small0") == "small0" and len(found) == 4
    for failure in found.values():
        assert isinstance(failure, Failure) and failure.kind == "resources"
        assert failure.error.startswith(
            "needs 2 CPUs, no node has that (nodes: 1 of 1 CPUs, 0 GPUs, "
        )
    assert len(marks(tmp_path, "wide0", "began")) == 1


def test_a_node_that_takes_the_place_of_a_lost_one_gets_its_tasks(tmp_path: Path) -> None:
    with nodes(1, 2) as (cluster, (other,)):
        pool = FanOut(work, need=ResourceRequest(1), timeout_s=120)
        pool.add("wide", tmp_path, "wide", "", 8, need=ResourceRequest(2))
        for index in range(30):
            pool.add(f"small{index}", tmp_path, f"small{index}", "", 0.5)
        found: dict[str, Any] = {}
        for key, result in pool:
            found[key] = result
            if len(found) == 1:
                wait_for(lambda: marks(tmp_path, "wide", "began") != [])
                lose(other)
                cluster.add_node(num_cpus=2)
    assert all(found[key] == key for key in found) and len(found) == 31
    assert len(marks(tmp_path, "wide", "began")) == 2
    assert len(marks(tmp_path, "wide", "ended")) == 1


def test_one_task_takes_all_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own monitor, told that 3 GB more than is in use now is all there is.

    It kills the newest tasks of the node first, those that take little among them: these run again.
    """
    import ray

    memory = psutil.virtual_memory()
    allowed = memory.total - memory.available + 3e9
    if allowed + 2e9 > memory.total:
        pytest.skip("less than 5 GB of memory are free")
    monkeypatch.setenv("RAY_memory_usage_threshold", str(allowed / memory.total))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    retried: list[str] = []
    ray.init(
        address="local",
        num_cpus=3,
        object_store_memory=80_000_000,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        pool = FanOut(work, need=ResourceRequest(1), on_retry=lambda key, *_: retried.append(key))
        pool.add("old", tmp_path, "old", "", 15)
        pool.add("first", tmp_path, "first", "", 1)
        found: dict[str, Any] = {}
        for key, result in pool:
            found[key] = result
            if key == "first":
                pool.add("balloon", tmp_path, "balloon", "balloon", priority=3)
                pool.add("raise", tmp_path, "raise", "raise", priority=2)
                for index in range(3):
                    pool.add(f"new{index}", tmp_path, f"new{index}", "", 3)
                pool.add("never", tmp_path, "never", after=("balloon",))
    finally:
        ray.shutdown()
    balloon = found.pop("balloon")
    assert isinstance(balloon, Failure) and balloon.kind == "memory"
    assert balloon.error.startswith("killed by Ray because its node ran out of memory (")
    used = float(balloon.error.rsplit("it used ", 1)[1].removesuffix(" GB"))
    assert 1.5 < used < 6
    assert (found.pop("raise").kind, found.pop("never").kind) == ("error", "dependency")
    assert all(found[key] == key for key in found) and len(found) == 5
    assert len(marks(tmp_path, "balloon", "began")) == 1  # not again: neither by us nor by Ray
    for key in found:
        assert len(marks(tmp_path, key, "ended")) == 1
        assert len(marks(tmp_path, key, "began")) == 1 + retried.count(key)


def wait_for(fact: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.05)
