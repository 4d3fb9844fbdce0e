"""One attempt at a task of the fan-out, from its submission to Ray to its last word."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.outcomes import Failure, where
from cluster.room import GPU_TYPE
from cluster.task import End, Start, end_process, perform
from cluster.waiting import Job

# A kill that did nothing is sent again after so many seconds.
_KILL_S = 20.0


@dataclass(eq=False)
class Flight:
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
    ) -> Flight:
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
        return Flight(job, slot, name, stream.remote(call, progress), progress)

    def hear(self) -> Start | End:
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


def _remote(function: Callable[..., Any]) -> Any:
    """The function as a remote one: made anew, it is exported once to a cluster all the same."""
    import ray

    return ray.remote(function)
