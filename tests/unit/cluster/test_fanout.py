"""The parts of the fan-out that need no cluster: needs, order, what an exception is, a kill."""

from __future__ import annotations

import errno
import math
import subprocess
import sys
import time
from collections.abc import Container, Hashable, Iterator

import psutil
import pytest

from cluster.failures import Failure, of_exception, of_ray, one_line
from cluster.resources import Nodes, ResourceRequest
from cluster.task import Job, Waiting, end_process

GB = 1_000_000_000


def job(key: str, priority: float = 0, gpus: float = 0) -> Job:
    return Job(key, (), ResourceRequest(1, gpus), None, priority)


def nodes(*resources: dict[str, float]) -> Nodes:
    """Those nodes, as if Ray had just named them."""
    found = Nodes()
    found.learn({str(index): node for index, node in enumerate(resources)})
    return found


def lanes() -> Waiting:
    """With tasks that need a GPU in a lane of their own."""
    return Waiting(lambda need: need.gpus > 0)


@pytest.mark.parametrize(
    ("need", "times"),
    [
        (ResourceRequest(1), 4),
        (ResourceRequest(1.5), 2),
        (ResourceRequest(0.1), 40),  # 4 // 0.1 is 39
        (ResourceRequest(1, 0.5), 4),
        (ResourceRequest(1, 0.25), 4),
        (ResourceRequest(0.5, 0.25), 8),
        (ResourceRequest(1, 3), 0),
        (ResourceRequest(1, 0, 3 * GB), 3),
        (ResourceRequest(1, 0, 10 * GB), 1),
        (ResourceRequest(1, 0, 10 * GB + 1), 0),
        (ResourceRequest(0), 400),  # takes nothing, and still is a process
    ],
)
def test_how_often_a_need_fits_on_a_node(need: ResourceRequest, times: int) -> None:
    assert need.times({"CPU": 4.0, "GPU": 2.0, "memory": 10.0 * GB}) == times


def test_impossible_needs_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        ResourceRequest(1, 0, -5)
    with pytest.raises(ValueError, match="whole number, not 1.5"):
        ResourceRequest(1, 1.5)


def test_why_no_node_can_hold_a_need() -> None:
    found = nodes({"CPU": 4, "memory": 8 * GB}, {"CPU": 1, "GPU": 1, "memory": 4 * GB})
    memory = found.lacking(ResourceRequest(1, 0, int(12.34 * GB)))
    assert memory.error == "needs 12.3 GB of memory, the largest node has 8 GB"
    assert memory.kind == "memory"
    together = found.lacking(ResourceRequest(1, 1, 6 * GB))  # the node with the GPU has too little
    assert together.kind == "memory"
    assert together.error == (
        "needs 1 CPUs, 1 GPUs and 6 GB of memory, no node has that (nodes: "
        "1 of 1 CPUs, 1 GPUs, 4 GB; 1 of 4 CPUs, 0 GPUs, 8 GB)"
    )
    assert found.lacking(ResourceRequest(2, 1)).kind == "resources"
    assert nodes().lacking(ResourceRequest(2)).error == "needs 2 CPUs, the cluster has no node left"


def test_a_need_that_only_a_lost_node_could_hold_waits() -> None:
    found = nodes({"CPU": 1}, {"CPU": 4})
    assert (
        found.capacity(ResourceRequest(2)) == 2
        and found.seconds_unschedulable(ResourceRequest(2)) == 0
    )
    assert found.seconds_unschedulable(ResourceRequest(5)) == math.inf
    assert found.holders(ResourceRequest(2)) == {"1"} and found.holders(ResourceRequest(1)) == {
        "0",
        "1",
    }
    before = time.monotonic()
    found.learn({"0": {"CPU": 1}})
    assert (
        found.capacity(ResourceRequest(2)) == 0 and found.holders(ResourceRequest(2)) == frozenset()
    )
    assert found.seconds_unschedulable(ResourceRequest(2)) <= time.monotonic() - before
    since = time.monotonic()
    time.sleep(0.02)
    least = time.monotonic() - since
    assert least <= found.seconds_unschedulable(ResourceRequest(2)) <= time.monotonic() - before
    assert found.seconds_unschedulable(ResourceRequest(5)) == math.inf
    found.learn({"0": {"CPU": 1}, "2": {"CPU": 2}})  # another takes its place
    assert found.seconds_unschedulable(ResourceRequest(2)) == 0 and found.changes == 3


def test_jobs_go_by_priority_then_as_they_came_and_gpus_apart() -> None:
    waiting = lanes()
    for key, priority in (("a", 1), ("b", 5), ("c", 1), ("d", math.inf)):
        waiting.add(job(key, priority))
    waiting.add(job("g", 9, gpus=1))
    assert len(waiting) == 5
    assert order(waiting, {True}) == ["d", "b", "a", "c"]
    assert order(waiting) == ["g"] and waiting.first() is None and len(waiting) == 0


def order(waiting: Waiting, full: Container[Hashable] = ()) -> list[str]:
    """The keys of what may start, taken out."""
    keys = []
    while (first := waiting.first(full)) is not None:
        assert waiting.pop(first[0]) is first[1]
        keys.append(first[1].key)
    return keys


def test_the_first_of_all_lanes_goes_first() -> None:
    waiting = lanes()
    for key, priority, gpus in (("a", 1, 0), ("b", 2, 1), ("c", 3, 0), ("d", 2, 0)):
        waiting.add(job(key, priority, gpus))
    assert order(waiting) == ["c", "b", "d", "a"]


def test_lanes_are_made_anew_when_the_nodes_are_others() -> None:
    found = nodes({"CPU": 1}, {"CPU": 4})
    waiting = Waiting(found.holders)
    for key, cpus in (("wide0", 2.0), ("small", 1.0), ("wide1", 2.0)):
        waiting.add(Job(key, (), ResourceRequest(cpus), None, 0))
    assert order(waiting, {found.holders(ResourceRequest(2))}) == ["small"]
    found.learn({"0": {"CPU": 4}})
    waiting.regroup()
    assert order(waiting, {frozenset("1")}) == ["wide0", "wide1"]


def test_a_job_waits_for_all_that_it_comes_after() -> None:
    waiting = lanes()
    waiting.add(job("c"), after=("a", "b"))
    waiting.add(job("d"), after=("c",))
    assert waiting.ended("a", failed=False) == [] and waiting.first() is None
    assert waiting.ended("b", failed=False) == []
    assert order(waiting) == ["c"] and len(waiting) == 1


def test_what_waits_for_a_failure_is_dropped_to_the_last() -> None:
    """A chain longer than Python's recursion goes, and a job behind two failures: once."""
    waiting = lanes()
    waiting.add(job("both"), after=("x", "0"))
    for index in range(3000):
        waiting.add(job(str(index + 1)), after=(str(index),))
    dropped = waiting.ended("0", failed=True)
    assert [(job.key, cause) for job, cause in dropped[:3]] == [
        ("both", "0"),
        ("1", "0"),
        ("2", "1"),
    ]
    assert len(dropped) == 3001 and len(waiting) == 0
    assert waiting.ended("x", failed=True) == []


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def test_exceptions_for_want_of_memory_are_told_from_others() -> None:
    import numpy
    import torch

    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(MemoryError) as numpy_error:
        numpy.empty(1 << 60, dtype=numpy.uint8)
    behind = ValueError("layer 3")
    behind.__cause__ = MemoryError()
    for error in (
        torch_error.value,
        numpy_error.value,
        behind,
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        OSError(errno.ENOMEM, "no room"),
    ):
        assert of_exception(error).kind == "memory", error
    for error in (ValueError("out of memory"), OSError(errno.ENOENT, "x"), RuntimeError("3 + 4")):
        assert of_exception(error).kind == "error", error


def test_an_exception_is_one_line_and_its_traceback() -> None:
    try:
        raise KeyError("two\n lines  " + 1000 * "x")
    except KeyError as error:
        failure = of_exception(error)
    assert failure.error.startswith("KeyError: 'two\\n lines ") and len(failure.error) == 500
    assert "\n" not in failure.error and failure.error.endswith("...")
    assert "test_fanout.py" in failure.detail and 1000 * "x" in failure.detail
    assert of_exception(SystemExit()).error == "SystemExit"
    assert one_line(" a \n\n b\t") == "a b"


# What Ray 2.60 said of a balloon and of a process that was started after it, shortened.
OOM = """2 worker(s) were killed due to the node running low on memory. Memory on the node \
(IP: 192.0.2.2, ID: c98) was 4.34GB used / 23.54GB limit (0.184308)
OOM kill reason: Memory usage 4658659328B exceeded threshold of 4646071808B (18.4% of \
25276502016B limit)
Ray killed 2 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Task: job ID=01000000, lease ID=02, task name=new, required resources=\
{CPU: 1}, pid=12141, actual memory used=0.07GB, worker ID=d3)
Selected to kill: (Task: job ID=01000000, lease ID=01, task name=balloon, required resources=\
{CPU: 1}, pid=12062, actual memory used=2.55GB, worker ID=00)
(Task: job ID=01000000, lease ID=00, task name=old, required resources={CPU: 1}, pid=11627, \
actual memory used=0.07GB, worker ID=b7)
]
Top 10 memory users: PID	MEM(GB)	COMMAND
12062	2.55	ray::stream"""


def test_who_is_to_blame_for_a_node_without_memory() -> None:
    from ray.exceptions import OutOfMemoryError

    failure, mendable = of_ray(OutOfMemoryError(OOM), pid=12062)
    assert (failure.kind, mendable) == ("memory", False)
    assert failure.error == (
        "killed by Ray because its node ran out of memory (4.66 GB of 25.3 GB in use); "
        "it used 2.74 GB"
    )
    failure, mendable = of_ray(OutOfMemoryError(OOM), pid=12141)
    assert mendable
    assert failure.error.endswith("it used 75.2 MB, another task 2.74 GB")
    failure, mendable = of_ray(OutOfMemoryError(OOM), pid=12062, claim=3 * GB)
    assert mendable and failure.error.endswith("it used 2.74 GB and was to have 3 GB")
    assert not of_ray(OutOfMemoryError(OOM), pid=12062, claim=2 * GB)[1]
    # After the balloon has gone Ray may kill on: then the largest is one that takes little.
    after = OOM.replace("12062, actual memory used=2.55GB", "12062, actual memory used=0.01GB")
    failure, mendable = of_ray(OutOfMemoryError(after), pid=12141)
    assert (failure.kind, mendable) == ("memory", True)
    for pid, text in ((None, OOM), (12062, "in the words of another version"), (7, OOM)):
        failure, mendable = of_ray(OutOfMemoryError(text), pid)
        assert (failure.kind, mendable) == ("memory", False)
        assert "ran out of memory: " in failure.error and len(failure.error) <= 500


def test_what_of_ray_can_be_mended() -> None:
    from ray import exceptions

    lost = exceptions.WorkerCrashedError()
    assert of_ray(lost, None)[1] and of_ray(lost, None)[0].kind == "lost"
    assert of_ray(exceptions.NodeDiedError("gone"), None)[1]
    assert of_ray(exceptions.ObjectLostError("ff", None, "stack"), None)[1]
    full, mendable = of_ray(exceptions.ObjectStoreFullError("full"), None)
    assert (full.kind, mendable) == ("memory", False)
    system, mendable = of_ray(exceptions.RaySystemError("no module named x"), None)
    assert (system.kind, mendable) == ("error", False)


@pytest.fixture
def worker() -> Iterator[psutil.Process]:
    """A process titled as Ray titles a worker at the task cell 1, with a child."""
    code = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    process = subprocess.Popen(["ray::cell 1", "-c", code], executable=sys.executable)
    found = psutil.Process(process.pid)
    while not found.children():
        time.sleep(0.02)
    children = found.children()
    yield found
    for each in (found, *children):
        if each.is_running():
            each.kill()
    process.wait()


def test_a_kill_takes_the_process_of_that_task_alone(worker: psutil.Process) -> None:
    pid, born = worker.pid, worker.create_time()
    (child,) = worker.children()
    assert not end_process(pid, born, "cell 2")
    assert not end_process(pid, born, "cell 11")
    assert not end_process(pid, born - 100, "cell 1")  # the pid was another's then
    assert not end_process(1 << 22, born, "cell 1")
    assert not end_process(psutil.Process().pid, psutil.Process().create_time(), "cell 1")
    assert worker.status() != psutil.STATUS_ZOMBIE and child.is_running()
    worker.suspend()
    assert end_process(pid, born, "cell 1")
    worker.wait(60)
    psutil.wait_procs([child], 60)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_failure_says_its_kind() -> None:
    assert Failure("x", "y").kind == "error"
