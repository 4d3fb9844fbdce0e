"""Many independent tasks over a cluster: bounded in flight, retried for lost workers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Failure:
    """A task that failed: one line for the user, and the traceback."""

    error: str
    detail: str


class Cancelled(Exception):
    """The fan-out was stopped; tasks in flight were cancelled."""


def fan_out(
    function: Callable[..., Any],
    items: Mapping[str, tuple[Any, ...]],
    *,
    cpus: float,
    gpus: float = 0,
    retries: int = 3,
    in_flight: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[str], None] = lambda key: None,
) -> Iterator[tuple[str, Any]]:
    """Runs `function(*items[key])` as one Ray task per key; yields (key, result) as they end.

    A task that raises yields a `Failure` and the others go on; a lost worker or node is retried
    `retries` times. At most `in_flight` tasks are submitted at once (None: twice the cluster's
    room). Raises Cancelled soon after `should_stop()` says so.
    """
    import ray

    task = ray.remote(function).options(
        num_cpus=cpus, num_gpus=gpus, max_retries=retries, retry_exceptions=False
    )
    if in_flight is None:
        room = ray.cluster_resources()
        slots = room.get("GPU", 0) / gpus if gpus else room.get("CPU", 1) / max(cpus, 0.01)
        in_flight = max(2, 2 * int(slots))
    waiting = list(items.items())
    running: dict[Any, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < in_flight:
                key, arguments = waiting.pop(0)
                running[task.remote(*arguments)] = key
                on_start(key)
            ready, _ = ray.wait(list(running), num_returns=1, timeout=0.3)
            if should_stop():
                raise Cancelled
            for reference in ready:
                key = running.pop(reference)
                yield key, _outcome(reference)
    finally:
        # Not by force: Ray 2.60 aborts the driver when a task killed so has just answered.
        for reference in running:
            ray.cancel(reference, force=False)


def _outcome(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        text = " ".join(str(cause).split()) or type(cause).__name__
        return Failure(f"{type(cause).__name__}: {text}"[:500], str(error))
    except ray.exceptions.RayError as error:
        return Failure(f"{type(error).__name__}: {' '.join(str(error).split())}"[:500], str(error))
