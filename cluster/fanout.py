"""Many independent tasks over a cluster: one Ray task each, bounded in flight, every end named."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from cluster.failures import Failure, Timing, of_ray, one_line, where
from cluster.kv import NOTIFY_S, Board, Progress
from cluster.resources import Nodes, ResourceRequest
from cluster.task import End, Job, Start, TaskAttempt, Waiting

__all__ = ["Cancelled", "Failure", "FanOut", "ResourceRequest", "Progress", "Timing", "fan_out"]

_POLL_S = 0.3
# Where memory ran out by no fault of a task it rests before its second attempt, twice so long
# before its third: until then others may have ended.
_REST_S = 5.0
_WORD_S = 3.0  # between two words that nothing runs
# A task whose process outlives so many kills is given up on.
_KILLS = 3
# Ray may hold so many times what the nodes can run: the next task is there when one ends.
_AHEAD = 2.0


class Cancelled(Exception):
    """The fan-out was stopped; tasks in flight were cancelled."""


class FanOut:
    """Runs one function over many arguments as Ray tasks; iterating yields (key, result).

    A task that fails yields a `Failure` and the others go on. Ray itself retries nothing: a lost
    worker or node is made good by submitting the task again, never what the function raised, what
    took too much memory, or what took too long.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        need: ResourceRequest,
        retries: int = 3,
        max_running: int | None = None,
        limit_s: float | None = None,
        timeout_s: float = 60.0,
        should_stop: Callable[[], bool] = lambda: False,
        on_start: Callable[[str, str], None] = lambda key, where: None,
        on_retry: Callable[[str, str, int], None] = lambda key, why, attempt: None,
        on_wait: Callable[[ResourceRequest, float], None] = lambda need, seconds: None,
        on_progress: Callable[[str, Progress], None] | None = None,
    ) -> None:
        """need, limit_s: of tasks that are added without their own; limit_s in seconds of running.

        retries: new attempts of a task whose worker or node was lost, or that Ray killed because
        others took its node's memory. in_flight: tasks that Ray has
        at once; None: twice what the nodes have room for, in CPUs, GPUs and memory. patience_s: a
        task that no living node can hold since a node was lost fails after so long. on_start(key,
        where) when it begins to run; on_retry(key, why, attempt) when it is to run again, with the
        number of the new attempt (the second is 2). on_wait(need, seconds) now and then while tasks
        are with Ray and none runs: what one of them needs, and for how long that has been so.
        on_progress(key, progress) when a running task has said how far it is, about once a second;
        the function is then called with a `report` more, a `cluster.kv.Report`.
        """
        self._function, self._need, self._limit_s = function, need, limit_s
        self._retries, self._max_running, self._timeout_s = retries, max_running, timeout_s
        self._should_stop, self._on_start, self._on_retry = should_stop, on_start, on_retry
        self._on_wait, self._on_progress = on_wait, on_progress
        self._board, self._next_read = Board(), 0.0
        self._idle_since: float | None = None  # monotonic
        self._next_word = 0.0
        self._nodes = Nodes()
        self._waiting = Waiting(self._lane)
        self._changes = 0  # of the nodes, that the lanes are made for
        self._flying: dict[Any, TaskAttempt] = {}  # by stream
        self._slots: list[int] = []  # numbers that are free
        self._slots_made = 0
        self._resting: list[tuple[float, Job]] = []  # until when, monotonic
        self._outcomes: deque[tuple[str, Any]] = deque()
        self._ends: dict[str, Failure | None] = {}
        self._known: set[str] = set()
        self.timings: dict[str, Timing] = {}  # of tasks that have ended

    def add(
        self,
        key: str,
        *arguments: Any,
        need: ResourceRequest | None = None,
        after: Sequence[str] = (),
        priority: float = 0,
        limit_s: float | None = None,
    ) -> None:
        """A task `function(*arguments)`; also while iterating.

        It starts when the tasks `after` have ended, and not at all if one of them failed. Higher
        priority goes first: give how long it takes, and the last tasks end together. Raises
        ValueError for a key that was added before, and for an unknown one in `after`.
        """
        if key in self._known:
            raise ValueError(f"task {key} was added already")
        if unknown := [name for name in after if name not in self._known]:
            raise ValueError(f"task {key} is to run after {unknown[0]}, which was not added")
        self._known.add(key)
        limit = self._limit_s if limit_s is None else limit_s
        job = Job(key, arguments, need or self._need, limit, priority)
        if failed := [name for name in after if self._ends.get(name)]:
            self._skip(job, failed[0])
        else:
            self._waiting.add(job, (name for name in after if name not in self._ends))

    def __contains__(self, key: str) -> bool:
        """Whether a task of this key was added."""
        return key in self._known

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yields (key, what the function returned or a Failure) as tasks end, until none is left.

        Raises Cancelled soon after `should_stop()` says so. Tasks in flight are then cancelled, as
        when the iteration is left early; one that does not heed that ends with Ray's shutdown.
        """
        try:
            while self._waiting or self._resting or self._flying or self._outcomes:
                if self._should_stop():
                    raise Cancelled
                if self._nodes.refresh():
                    self._give_up_unschedulable()
                self._submit()
                self._collect()
                self._watch_limits()
                self._notify_waiting()
                self._notify_progress()
                while self._outcomes:
                    yield self._outcomes.popleft()
                    if self._should_stop():
                        raise Cancelled
        finally:
            self._cancel()

    def busy_s(self) -> float:
        """Seconds that tasks ran, summed over all that started, of each its last attempt."""
        times = self.timings.values()
        return sum(time.ended - time.started for time in times if time.started is not None)

    def makespan_s(self) -> float:
        """Seconds from the first submission to the last end; 0 if nothing was submitted."""
        times = [time for time in self.timings.values() if time.submitted is not None]
        if not times:
            return 0.0
        return max(t.ended for t in times) - min(t.submitted or 0.0 for t in times)

    # Tasks go to Ray.

    def _submit(self) -> None:
        if self._changes != self._nodes.changes:
            self._changes = self._nodes.changes
            self._waiting.regroup()
        for item in [item for item in self._resting if item[0] <= time.monotonic()]:
            self._resting.remove(item)
            self._waiting.add(item[1])
        loads: dict[Hashable, float] = {}
        for task_attempt in self._flying.values():
            lane = self._lane(task_attempt.job.need)
            loads[lane] = loads.get(lane, 0.0) + self._share(task_attempt.job.need)
        full: set[Hashable] = set()
        while self._max_running is None or len(self._flying) < self._max_running:
            first = self._waiting.first(full)
            if first is None:
                break
            lane, job = first
            load = loads.get(lane, 0.0) + self._share(job.need)
            if self._nodes.seconds_unschedulable(job.need) > self._timeout_s:
                self._waiting.pop(lane)
                self._end(job, self._nodes.lacking(job.need))
            elif self._max_running is None and load > _AHEAD + 1e-9:
                full.add(lane)
            else:
                loads[lane] = load
                self._launch(self._waiting.pop(lane))

    def _launch(self, job: Job) -> None:
        if not self._slots:
            self._slots.append(self._slots_made)
            self._slots_made += 1
        progress = None if self._on_progress is None else self._board.new_key()
        task_attempt = TaskAttempt.launch(self._function, job, self._slots.pop(), progress)
        self._flying[task_attempt.stream] = task_attempt

    def _remove(self, task_attempt: TaskAttempt) -> None:
        del self._flying[task_attempt.stream]
        if task_attempt.progress is not None:
            self._board.drop(task_attempt.progress)
        if not task_attempt.kills:  # a kill under way must not meet another task of its name
            self._slots.append(task_attempt.slot)

    def _lane(self, need: ResourceRequest) -> Hashable:
        """Tasks of equal lanes compete for the same nodes, and GPUs."""
        return need.gpus > 0, self._nodes.holders(need)

    def _share(self, need: ResourceRequest) -> float:
        """The part of the cluster that a task takes; of a task that has no place now, 1."""
        return 1.0 / max(1, self._nodes.capacity(need))

    # What comes back.

    def _collect(self) -> None:
        """Waits for an answer for a moment; takes in all that are there."""
        import ray

        if not self._flying:
            if not self._outcomes:
                time.sleep(_POLL_S)
            return
        ready, _ = ray.wait(list(self._flying), num_returns=1, timeout=_POLL_S)
        if ready:
            ready, _ = ray.wait(list(self._flying), num_returns=len(self._flying), timeout=0)
        for stream in ready:
            self._take(self._flying[stream])

    def _take(self, task_attempt: TaskAttempt) -> None:
        """The next word of a task."""
        import ray

        try:
            word = task_attempt.poll()
        except StopIteration:
            why = "its task ended without an answer"
            self._failed(task_attempt, Failure(why, why, "lost"), mendable=True)
        except ray.exceptions.RayError as error:
            pid = task_attempt.start.pid if task_attempt.start else None
            failure, mendable = of_ray(error, pid, task_attempt.job.need.memory)
            self._failed(task_attempt, failure, mendable)
        else:
            if isinstance(word, Start):
                self._on_start(task_attempt.job.key, where(word))
            else:
                self._finish(task_attempt, word.value, word)

    def _failed(self, task_attempt: TaskAttempt, failure: Failure, mendable: bool) -> None:
        """A task whose process did not answer: it runs again, or that is its end."""
        job = task_attempt.job
        if failure.kind == "lost":
            self._nodes.refresh(now=True)  # what comes next may have less room
        if task_attempt.kills and failure.kind == "lost":
            self._finish(task_attempt, task_attempt.too_long())
        elif mendable and job.attempts <= self._retries:
            self._remove(task_attempt)
            rest_s = _REST_S * job.attempts if failure.kind == "memory" else 0.0
            self._resting.append((time.monotonic() + rest_s, job))
            self._on_retry(job.key, failure.error, job.attempts + 1)
        elif failure.kind == "lost":
            error = f"its worker or node was lost {job.attempts} times: {failure.error}"
            self._finish(task_attempt, Failure(one_line(error), failure.detail, "lost"))
        else:
            self._finish(task_attempt, failure)

    def _finish(self, task_attempt: TaskAttempt, value: object, end: End | None = None) -> None:
        self._remove(task_attempt)
        self._end(task_attempt.job, value, task_attempt.start, end)

    def _end(
        self, job: Job, value: object, start: Start | None = None, end: End | None = None
    ) -> None:
        self.timings[job.key] = Timing(
            job.submitted,
            start.time if start else None,
            end.time if end else time.time(),
            start.node if start else None,
            start.pid if start else None,
            job.attempts,
        )
        failure = value if isinstance(value, Failure) else None
        self._ends[job.key] = failure
        self._outcomes.append((job.key, value))
        for behind, cause in self._waiting.ended(job.key, failed=failure is not None):
            self._skip(behind, cause)

    def _skip(self, job: Job, failed: str) -> None:
        """The end of a job that was not started because the task `failed` did."""
        cause = self._ends[failed]
        assert cause is not None
        error = one_line(f"not started: {failed} failed")
        self._end(job, Failure(error, f"{error}: {cause.error}", "dependency"))

    # Tasks that do not end, or cannot start.

    def _watch_limits(self) -> None:
        for task_attempt in list(self._flying.values()):
            if not task_attempt.overdue():
                continue
            if task_attempt.kills == _KILLS:
                self._finish(
                    task_attempt, task_attempt.too_long("; its process could not be ended")
                )
            else:
                task_attempt.kill()

    def _notify_waiting(self) -> None:
        """Says so while Ray has tasks and runs none of them."""
        task_attempts, now = list(self._flying.values()), time.monotonic()
        if not task_attempts or any(
            task_attempt.start is not None for task_attempt in task_attempts
        ):
            self._idle_since = None
            return
        if self._idle_since is None:
            self._idle_since, self._next_word = now, now + _WORD_S
        if now >= self._next_word:
            self._next_word = now + _WORD_S
            self._on_wait(task_attempts[0].job.need, now - self._idle_since)

    def _notify_progress(self) -> None:
        """Passes on how far the running tasks are."""
        if self._on_progress is None or time.monotonic() < self._next_read:
            return
        running = {
            task_attempt.progress: task_attempt.job.key
            for task_attempt in self._flying.values()
            if task_attempt.progress is not None and task_attempt.start is not None
        }
        for key, progress in self._board.read(running):
            self._on_progress(running[key], progress)
        self._next_read = time.monotonic() + NOTIFY_S

    def _give_up_unschedulable(self) -> None:
        """Tasks that Ray has and that no living node can hold: it would wait for ever."""
        for task_attempt in list(self._flying.values()):
            need = task_attempt.job.need
            if (
                task_attempt.start is None
                and self._nodes.seconds_unschedulable(need) > self._timeout_s
            ):
                task_attempt.cancel()
                self._finish(task_attempt, self._nodes.lacking(need))

    def _cancel(self) -> None:
        for task_attempt in self._flying.values():
            task_attempt.cancel()
        self._flying.clear()
        self._board.close()


def fan_out(
    function: Callable[..., Any],
    items: Mapping[str, tuple[Any, ...]],
    *,
    cpus: float,
    gpus: float = 0,
    retries: int = 3,
    max_running: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[str], None] = lambda key: None,
    on_wait: Callable[[ResourceRequest, float], None] = lambda need, seconds: None,
) -> Iterator[tuple[str, Any]]:
    """Runs `function(*items[key])` as one Ray task per key; yields (key, result) as they end.

    A `FanOut` over tasks that are alike and known beforehand. Raises Cancelled as it does.
    """
    pool = FanOut(
        function,
        need=ResourceRequest(cpus, gpus),
        retries=retries,
        max_running=max_running,
        should_stop=should_stop,
        on_start=lambda key, where: on_start(key),
        on_wait=on_wait,
    )
    for key, arguments in items.items():
        pool.add(key, *arguments)
    yield from pool
