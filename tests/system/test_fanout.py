"""The fan-out on one node of two CPUs: what ends how, in what order, and what runs how often."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cluster.fanout import Cancelled, Failure, FanOut, Progress, fan_out
from cluster.resources import ResourceRequest

pytestmark = pytest.mark.timeout(400)

MEMORY = 1_000_000_000
LONG_S = 600.0  # longer than a test may take
ONE = ResourceRequest(1)


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    """Two CPUs and a gigabyte of Ray's logical memory, started as in the background of a shell."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    ray.init(
        address="local",
        num_cpus=2,
        _memory=MEMORY,
        object_store_memory=100_000_000,
        include_dashboard=False,
        log_to_driver=False,
    )
    signal.signal(signal.SIGINT, interrupt)
    yield ray
    ray.shutdown()


class Unsendable(Exception):
    """Cannot be unpickled: it wants two arguments and keeps one."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def work(folder: Path, key: str, what: str = "", seconds: float = 0) -> Any:
    """A task of many kinds that leaves a line in `folder` when it begins and when it ends."""
    mark(folder, key, "began")
    end = time.monotonic() + seconds
    while time.monotonic() < end:  # Ray's interrupts come between two lines of Python
        time.sleep(0.02)
    if what == "raise":
        raise ValueError(f"{key} is\nwrong")
    if what == "unsendable":
        raise Unsendable(1, 2)
    if what == "exit":
        raise SystemExit(3)
    if what == "memory":
        raise MemoryError
    if what == "cuda":
        raise OutOfMemoryError("Tried to allocate 2.00 GiB")
    if what == "lambda":
        return lambda: (yield)  # goes over
    if what == "lock":
        import threading

        return threading.Lock()  # does not
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "die once" and count(folder, key, "began") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "term once" and count(folder, key, "began") == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "stuck":
        ctypes.PyDLL(None).sleep(600)  # in C, and holds the interpreter's lock
    if what == "meet":  # ends only if another task runs at the same time
        wait_for(lambda: len(list(folder.glob("*.began"))) > 1)
    if what == "child":
        child = subprocess.Popen(["sleep", "600"])
        (folder / "child").write_text(str(child.pid))
        child.wait()
    mark(folder, key, "ended")
    return key, what, os.getpid()


def mark(folder: Path, key: str, word: str) -> None:
    with open(folder / f"{key}.{word}", "a") as file:
        file.write(f"{os.getpid()}\n")


def count(folder: Path, key: str, word: str) -> int:
    path = folder / f"{key}.{word}"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_all_ends_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    kinds = ["raise", "unsendable", "exit", "memory", "cuda", "lock"]
    retried: list[Any] = []
    pool = FanOut(work, need=ONE, on_retry=lambda *told: retried.append(told))
    for index in range(6):
        pool.add(f"good{index}", tmp_path, f"good{index}")
        pool.add(kinds[index], tmp_path, kinds[index], kinds[index])
    found = dict(pool)
    assert len(found) == 12 and not retried
    for key, result in found.items():
        assert count(tmp_path, key, "began") == 1
        if key.startswith("good"):
            assert result[:2] == (key, "") and count(tmp_path, key, "ended") == 1
        else:
            assert isinstance(result, Failure) and "work" in result.detail or key == "lock"
    failures = {key: (found[key].error, found[key].kind) for key in kinds}
    assert failures["raise"] == ("ValueError: raise is wrong", "error")
    assert failures["unsendable"] == ("Unsendable: 1 and 2", "error")
    assert failures["exit"] == ("SystemExit: 3", "error")
    assert failures["memory"] == ("MemoryError", "memory")
    assert failures["cuda"] == ("OutOfMemoryError: Tried to allocate 2.00 GiB", "memory")
    assert failures["lock"][0].startswith("TypeError: ") and failures["lock"][1] == "error"


def test_the_order_is_by_priority_and_by_what_comes_after_what(tmp_path: Path) -> None:
    began: list[str] = []
    pool = FanOut(
        work, need=ONE, max_running=1, on_start=lambda key, where: began.append(f"{key} {where}")
    )
    pool.add("base", tmp_path, "base", "", 0.2)
    pool.add("behind", tmp_path, "behind", after=("base",), priority=9)
    for key, priority in (("a", 1.0), ("b", 5.0), ("c", 1.0), ("d", float("inf"))):
        pool.add(key, tmp_path, key, priority=priority)
    ended = [key for key, _ in pool]
    assert ended == [line.split()[0] for line in began] == ["d", "b", "a", "c", "base", "behind"]
    assert f"pid {pool.timings['a'].pid})" in began[2]


def test_results_decide_what_comes_next(tmp_path: Path) -> None:
    pool = FanOut(work, need=ONE)
    pool.add("0", tmp_path, "0")
    seen = []
    for key, _ in pool:
        seen.append(key)
        if int(key) < 3:
            name = str(int(key) + 1)
            pool.add(name, tmp_path, name, after=(key,))  # ended already
    assert seen == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="task 2 was added already"):
        pool.add("2", tmp_path, "2")
    with pytest.raises(ValueError, match="task 9 is to run after 8, which was not added"):
        pool.add("9", tmp_path, "9", after=("8",))
    pool.add("4", tmp_path, "4", "raise")
    pool.add("5", tmp_path, "5", after=("4", "0"))
    pool.add("6", tmp_path, "6", after=("5",))
    found = dict(pool)
    pool.add("7", tmp_path, "7", after=("6",))  # failed already
    found |= dict(pool)
    assert [found[key].error for key in "4567"] == [
        "ValueError: 4 is wrong",
        "not started: 4 failed",
        "not started: 5 failed",
        "not started: 6 failed",
    ]
    assert [found[key].kind for key in "567"] == 3 * ["dependency"]
    assert "ValueError: 4 is wrong" in found["5"].detail
    assert not (tmp_path / "5.began").exists() and pool.timings["5"].submitted is None


def test_a_lost_worker_is_made_good_and_one_that_always_dies_is_lost(tmp_path: Path) -> None:
    retried: list[tuple[str, str, int]] = []
    pool = FanOut(work, need=ONE, retries=2, on_retry=lambda *told: retried.append(told))
    # SIGKILL, and SIGTERM, by which Ray ends workers of a node that shuts down or has no memory.
    for key in ("die once", "term once", "die", "good"):
        pool.add(key, tmp_path, key, key)
    pool.add("behind", tmp_path, "behind", after=("die",))
    found = dict(pool)
    assert all(found[key][0] == key for key in ("die once", "term once", "good"))
    assert found["die"].kind == "lost"
    assert found["die"].error.startswith("its worker or node was lost 3 times: WorkerCrashedError")
    assert found["behind"].kind == "dependency"
    began = {key: count(tmp_path, key, "began") for key in (*found, "behind")}
    assert began == {"die once": 2, "term once": 2, "die": 3, "good": 1, "behind": 0}
    assert sorted((key, attempt) for key, _, attempt in retried) == [
        ("die", 2),
        ("die", 3),
        ("die once", 2),
        ("term once", 2),
    ]
    assert pool.timings["die once"].attempts == pool.timings["term once"].attempts == 2


def test_what_fits_on_no_node_is_refused_with_the_numbers(tmp_path: Path) -> None:
    pool = FanOut(work, need=ONE)
    pool.add("large", tmp_path, "large", need=ResourceRequest(1, 0, 12_300_000_000))
    pool.add("wide", tmp_path, "wide", need=ResourceRequest(3))
    pool.add("gpu", tmp_path, "gpu", need=ResourceRequest(1, 1))
    pool.add("good", tmp_path, "good", need=ResourceRequest(2, 0, MEMORY))
    found = dict(pool)
    assert found["good"][0] == "good"
    assert found["large"].kind == "memory"
    assert found["large"].error == "needs 12.3 GB of memory, the largest node has 1 GB"
    assert (found["wide"].kind, found["gpu"].kind) == ("resources", "resources")
    assert all(pool.timings[key].submitted is None for key in ("large", "wide", "gpu"))
    there = "no node has that (nodes: 1 of 2 CPUs, 0 GPUs, 1 GB)"
    assert found["wide"].error == f"needs 3 CPUs, {there}"
    assert found["gpu"].error == f"needs 1 CPUs and 1 GPUs, {there}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.began", "good.ended"]


def test_tasks_run_together_where_memory_holds_them(tmp_path: Path) -> None:
    pool = FanOut(work, need=ResourceRequest(0.5, 0, int(0.4 * MEMORY)))
    for key in "abc":
        pool.add(key, tmp_path, key, "meet")
    assert not any(isinstance(result, Failure) for _, result in pool)


def test_tasks_wait_for_memory(tmp_path: Path) -> None:
    pool = FanOut(work, need=ResourceRequest(0.5, 0, int(0.6 * MEMORY)))
    for key in "abc":
        pool.add(key, tmp_path, key, "", 0.5)
    assert not any(isinstance(result, Failure) for _, result in pool)
    spans = sorted((time.started, time.ended) for time in pool.timings.values())
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_a_task_that_hangs_is_ended_at_its_limit(tmp_path: Path) -> None:
    """Stopped, stuck in C, and waiting for a child; the time in the queue does not count."""
    limit_s = 6.0
    began = time.time()
    pool = FanOut(work, need=ONE, max_running=9, limit_s=limit_s)
    hang = ("stop", "stuck", "child")
    for key in hang:
        pool.add(key, tmp_path, key, key, priority=1)
    for index in range(4):  # they wait for longer than that
        pool.add(f"good{index}", tmp_path, f"good{index}")
    pool.add("patient", tmp_path, "patient", "", limit_s + 0.5, limit_s=100)
    found = dict(pool)
    for key in hang:
        assert (found[key].error, found[key].kind) == ("took longer than 0.1 minutes", "time")
        time_ = pool.timings[key]
        assert limit_s <= time_.ended - time_.started  # by itself none ends within the test's time
        assert time_.attempts == 1
        # Ray hears that the connection was closed while the kernel still takes the process apart.
        wait_for(gone(time_.pid))
        assert f"pid {time_.pid})" in found[key].detail
    child = int((tmp_path / "child").read_text())
    wait_for(gone(child))
    good = [key for key in found if key not in hang]
    assert len(good) == 5 and all(found[key][0] == key for key in good)
    assert all(count(tmp_path, key, "began") == 1 for key in found)
    for time_ in (pool.timings[key] for key in good):
        assert time_.started - began > limit_s


def test_a_stop_ends_it_before_its_tasks(tmp_path: Path) -> None:
    stop: list[bool] = []
    pool = FanOut(work, need=ONE, should_stop=lambda: bool(stop))
    pool.add("first", tmp_path, "first")
    for index in range(9):
        pool.add(f"long{index}", tmp_path, f"long{index}", "", LONG_S)
    with pytest.raises(Cancelled):
        for key, _ in pool:
            assert key == "first"
            wait_for(lambda: any(tmp_path.glob("long*.began")))
            stop.append(True)
    # The CPUs are free again: those that ran were interrupted, those that waited never begin.
    assert dict(fan_out(work, {"next": (tmp_path, "next")}, cpus=2))["next"][0] == "next"
    assert 1 <= len(list(tmp_path.glob("long*.began"))) <= 2
    assert not list(tmp_path.glob("long*.ended"))


def test_leaving_the_loop_cancels_what_runs(tmp_path: Path) -> None:
    items = {"first": (tmp_path, "first"), "long": (tmp_path, "long", "", LONG_S)}
    for key, _ in fan_out(work, items, cpus=1):
        assert key == "first"
        wait_for((tmp_path / "long.began").exists)
        break
    assert dict(fan_out(work, {"next": (tmp_path, "next")}, cpus=2))["next"][0] == "next"
    assert not (tmp_path / "long.ended").exists()


def test_fan_out_maps_as_before(tmp_path: Path) -> None:
    started: list[str] = []
    items = {str(index): (tmp_path, str(index)) for index in range(20)}
    found = dict(fan_out(work, items, cpus=0.5, retries=1, max_running=4, on_start=started.append))
    assert {key: result[0] for key, result in found.items()} == {key: key for key in items}
    assert sorted(started) == sorted(items)


def test_arguments_and_results_may_be_large(ray: Any) -> None:
    """Above what Ray keeps in messages they go through its object store, and leave it again."""
    block = np.arange(1_000_000, dtype=np.float64)  # 8 MB; the store has 100
    pool = FanOut(double, need=ONE)
    for index in range(16):
        pool.add(str(index), block, index)
    total = 0.0
    for _, result in pool:
        total += result[-1]
    del result
    assert total == sum(2 * block[-1] + index for index in range(16))
    store = "object_store_memory"
    wait_for(lambda: ray.available_resources()[store] > ray.cluster_resources()[store] - 1e6)


def double(block: Any, index: int) -> Any:
    return 2 * block + index


def test_times_add_up(tmp_path: Path) -> None:
    pool = FanOut(span, need=ONE)
    assert (pool.busy_s(), pool.makespan_s()) == (0, 0)
    for index in range(6):
        pool.add(str(index), 0.3)
    asked = time.time()
    spans = [found for _, found in pool]
    took = time.time() - asked
    inside = sum(ended - began for began, ended in spans)
    whole = max(ended for _, ended in spans) - min(began for began, _ in spans)
    # What the tasks say themselves lies within what is said of them, without their waiting.
    assert inside <= pool.busy_s() <= 2 * pool.makespan_s()
    assert whole <= pool.makespan_s() <= took
    first = min(time.started for time in pool.timings.values())
    assert asked <= min(time.submitted for time in pool.timings.values()) <= first


def span(seconds: float) -> tuple[float, float]:
    """When a task of so many seconds began and ended."""
    began = time.time()
    time.sleep(seconds)
    return began, time.time()


def gone(pid: int) -> Callable[[], bool]:
    return lambda: not psutil.pid_exists(pid)


def wait_for(fact: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.05)


def reporter(folder: Path, key: str, report: Any) -> str:
    """Says how far it is and waits each time until the driver has heard it; dies once at half."""
    mark(folder, key, "began")
    for percent in (25, 50, 75):
        report(percent / 100, f"{percent} of 100")
        while not (folder / f"{key} {percent}").exists():
            time.sleep(0.02)
        if key == "dies once" and percent == 50 and count(folder, key, "began") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return key


def test_the_driver_hears_how_far_running_tasks_are(tmp_path: Path) -> None:
    told: dict[str, list[tuple[float, str]]] = {"steady": [], "dies once": []}

    def poll(key: str, progress: Progress) -> None:
        told[key].append((progress.done, progress.words))
        (tmp_path / f"{key} {round(100 * progress.done)}").touch()

    pool = FanOut(reporter, need=ONE, on_progress=poll)
    for key in told:
        pool.add(key, tmp_path, key)
    assert dict(pool) == {key: key for key in told}
    steps = [(0.25, "25 of 100"), (0.5, "50 of 100"), (0.75, "75 of 100")]
    # The last word of an attempt may be lost with it, or be overtaken by the next attempt's end.
    assert told["steady"][:2] == steps[:2]
    assert told["dies once"][:2] == steps[:2]
    assert count(tmp_path, "dies once", "began") == 2
    from ray.experimental import internal_kv

    assert internal_kv._internal_kv_list("", namespace="task-progress") == []
