"""A task of the fan-out: the queue of those that wait, an attempt at one, what its worker runs."""

from __future__ import annotations

import heapq
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.failures import Failure, of_exception, where
from cluster.kv import reporting
from cluster.resources import ResourceRequest
from cluster.session import GPU_TYPE

if TYPE_CHECKING:
    from ray.remote_function import RemoteFunction


@dataclass(frozen=True)
class Start:
    """The first word of a task: where it runs, since when (seconds since the epoch).

    born: when its process was created. A pid alone may be another process's by now.
    """

    node: str  # Ray's id
    host: str
    pid: int
    born: float
    time: float


@dataclass(frozen=True)
class End:
    """The last word of a task: what its function returned, or a Failure, and when."""

    value: Any
    time: float


def perform(call: bytes, progress: str | None = None) -> Iterator[Start | End]:
    """Runs the pickled (function, arguments) of `call`; yields its Start, then its End.

    progress: where the driver reads how far it is (`cluster.kv`); the function is then
    called with a `report` more.

    What the function raises comes back as a Failure: an exception may be unknown to the driver, or
    not fit for pickling. It is unpickled after the Start is out, so that imports count as running.
    """
    import psutil
    import ray

    # Ray cancels by SIGINT, which a shell has what it starts in the background ignore, and so its
    # children, this process among them.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    pid = os.getpid()
    node = ray.get_runtime_context().get_node_id()
    born = psutil.Process(pid).create_time()
    yield Start(node, socket.gethostname(), pid, born, time.time())
    value: Any
    try:
        function, arguments = pickle.loads(call)
        with reporting(progress) as report:
            more = {} if progress is None else {"report": report}
            value = function(*arguments, **more)
    except (Exception, SystemExit) as error:  # not KeyboardInterrupt: so Ray cancels
        # Ray's own way out after SIGTERM, such as from its memory monitor or of a node that shuts
        # down: the process was taken away, the function has not ended.
        if hasattr(error, "ray_terminate_msg"):
            raise
        value = of_exception(error)
    yield End(value, time.time())


def end_process(pid: int, born: float, name: str) -> bool:
    """Kills a worker of this node, and its children, if it still is at the task of that name.

    SIGKILL also ends a process that is stopped or does not come back from C. pid, born: as in
    Start. Returns whether it was there.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        # Ray titles its workers by the task that they are at.
        titled = process.cmdline()[:1] == [f"ray::{name}"]
        if abs(process.create_time() - born) > 1 or not titled:
            return False
        children = process.children(recursive=True)
        process.kill()
    except psutil.NoSuchProcess:
        return False
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    return True


@dataclass
class Job:
    """One task of a fan-out. limit_s: seconds that it may run; the rest is its history."""

    key: str
    arguments: tuple[Any, ...]
    need: ResourceRequest
    limit_s: float | None
    priority: float
    attempts: int = 0
    submitted: float | None = None


class Waiting:
    """Jobs by priority, of equal ones the first added first, in lanes.

    Jobs of one lane compete for the same nodes. So those that wait for a GPU, or for the one large
    node, do not hold up the others.
    """

    def __init__(self, lane_of: Callable[[ResourceRequest], Hashable]) -> None:
        """lane_of: the lane of a need, as the nodes are now."""
        self._lane_of = lane_of
        self._lanes: dict[Hashable, list[tuple[float, int, Job]]] = {}
        self._blocked: dict[str, tuple[Job, set[str]]] = {}
        self._behind: dict[str, list[str]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._blocked) + sum(len(lane) for lane in self._lanes.values())

    def add(self, job: Job, after: Iterable[str] = ()) -> None:
        """A job that may start once the keys `after` have ended."""
        missing = set(after)
        if not missing:
            self._count += 1
            self._push((-job.priority, self._count, job))
            return
        self._blocked[job.key] = (job, missing)
        for key in missing:
            self._behind.setdefault(key, []).append(job.key)

    def _push(self, entry: tuple[float, int, Job]) -> None:
        heapq.heappush(self._lanes.setdefault(self._lane_of(entry[-1].need), []), entry)

    def regroup(self) -> None:
        """Puts the jobs in their lanes anew: the nodes are others."""
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            for entry in lane:
                self._push(entry)

    def ended(self, key: str, failed: bool) -> list[tuple[Job, str]]:
        """Frees what waited for `key`.

        If that failed: takes out what waited for it, and what waited for those, and returns each
        with the key that it waited for.
        """
        dropped: list[tuple[Job, str]] = []
        failures = [key] if failed else []
        for cause in failures or [key]:
            for name in self._behind.pop(cause, ()):
                if name not in self._blocked:
                    continue  # taken out because another one failed
                job, missing = self._blocked[name]
                missing.discard(cause)
                if failed:
                    del self._blocked[name]
                    dropped.append((job, cause))
                    failures.append(name)  # its turn comes in this loop
                elif not missing:
                    del self._blocked[name]
                    self.add(job)
        return dropped

    def first(self, full: Container[Hashable] = ()) -> tuple[Hashable, Job] | None:
        """The job whose turn it is, and its lane, of lanes that are not `full`; None if none is."""
        heads = [(lane[0], key) for key, lane in self._lanes.items() if lane and key not in full]
        if not heads:
            return None
        (_, _, job), key = min(heads, key=lambda head: head[0][:2])
        return key, job

    def pop(self, lane: Hashable) -> Job:
        """Takes out the first job of a lane."""
        job = heapq.heappop(self._lanes[lane])[-1]
        if not self._lanes[lane]:
            del self._lanes[lane]
        return job


# A kill that did nothing is sent again after so many seconds.
_KILL_S = 20.0


@dataclass(eq=False)
class TaskAttempt:
    """A job that Ray has. stream: of its Start and its End. name: as Ray and `ps` show it.

    slot: a number that no other flight has at the same time, part of the name. progress: where its
    progress is read, None if nobody asked for it.
    """

    job: Job
    slot: int
    name: str
    stream: Any
    progress: str | None = None
    start: Start | None = None
    kills: int = 0
    _heard: float = 0.0  # when the driver had the Start, monotonic
    _killed: float = 0.0  # when last, monotonic
    _killer: Any = None

    @staticmethod
    def launch(
        function: Callable[..., Any], job: Job, slot: int, progress: str | None = None
    ) -> TaskAttempt:
        """Hands a job to Ray, which retries nothing by itself.

        Its name is made of the key's part before the first slash, else of the function's name.
        """
        from ray import cloudpickle

        job.attempts += 1
        if job.submitted is None:
            job.submitted = time.time()
        kind, slash, _ = job.key.partition("/")
        # Not the key: Ray keeps 10 kB in the driver, for ever, of every name that it has seen.
        name = f"{kind if slash else getattr(function, '__name__', 'task')} {slot}"
        # A stream, because the driver must know when and where a task began to run: a time limit
        # that counted the time in Ray's queue would end tasks that wait for others.
        stream = _remote(perform).options(
            name=name,
            num_cpus=job.need.cpus,
            num_gpus=job.need.gpus,
            memory=job.need.memory or None,
            resources={GPU_TYPE + job.need.gpu_type: 0.001} if job.need.gpu_type else None,
            max_retries=0,
            retry_exceptions=False,
            num_returns="streaming",
        )
        call = cloudpickle.dumps((function, job.arguments))
        return TaskAttempt(job, slot, name, stream.remote(call, progress), progress)

    def poll(self) -> Start | End:
        """The next word of the task. Raises RayError, or StopIteration if there is none."""
        import ray

        word = ray.get(next(self.stream))
        if isinstance(word, Start):
            self.start, self._heard = word, time.monotonic()
        return word

    def overdue(self) -> bool:
        """Whether it has run for longer than its limit, and a kill is to be sent (again)."""
        now, limit = time.monotonic(), self.job.limit_s
        if self.start is None or limit is None or now - self._heard <= limit:
            return False
        return not self.kills or now - self._killed >= _KILL_S

    def kill(self) -> None:
        """Ends its process, by a task of no CPU on its node; if that is gone, so is the process."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        assert self.start is not None
        there = NodeAffinitySchedulingStrategy(self.start.node, soft=False)
        task = _remote(end_process).options(
            num_cpus=0, max_retries=0, scheduling_strategy=there, name=f"end {self.name}"
        )
        self._killer = task.remote(self.start.pid, self.start.born, self.name)
        self.kills, self._killed = self.kills + 1, time.monotonic()

    def cancel(self) -> None:
        """Tells Ray to drop it, or to interrupt it where it runs."""
        import ray

        # Not by force: Ray 2.60 aborts the driver when a task killed so has just answered.
        if ray.is_initialized():
            ray.cancel(self.stream, force=False)

    def too_long(self, more: str = "") -> Failure:
        """Its failure when it was ended at its limit."""
        assert self.start is not None and self.job.limit_s is not None
        error = f"took longer than {self.job.limit_s / 60:g} minutes{more}"
        return Failure(error, f"{error}; it ran on {where(self.start)}", "time")


def _remote(function: Callable[..., Any]) -> RemoteFunction:
    """The function as a remote one: made anew, it is exported once to a cluster all the same."""
    import ray

    return ray.remote(function)
