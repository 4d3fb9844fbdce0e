"""What every worker of a group does: a stage, and the stages that are handed over after it.

How a group ended a stage is an object on storage, `state/launches/<attempt>-<stage>.json`, created
once: by rank 0 when all is done or stopped, or by the first rank that met an error which a new
start cannot mend. A restarted group that finds it goes on behind it, or leaves.
"""

from __future__ import annotations

import ctypes
import gc
import json
import pickle
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from cluster.kv import Handover
from cluster.storage import Attempt, Fenced, Store
from jobs.run.requests import Requests

if TYPE_CHECKING:
    from trainer.run_task import Task
    from trainer.worker import Worker


class RanksApart(RuntimeError):
    """Ranks have waited too long for each other."""


@dataclass(frozen=True)
class Ranks:
    """What the ranks do for one stage: each task of `work`, one after the other."""

    stage: str
    work: Sequence[Task]
    attempt: Attempt
    outcome: str
    threads: int
    uses_gpu: bool
    collective_minutes: float


def rank_main(config: dict[str, Any]) -> None:
    """Entry point of every Ray Train worker; config: `ranks`, and `more`, where work follows."""
    from cluster.storage import EventWriter
    from trainer.messages import failure_reason, is_out_of_memory
    from trainer.worker import Hooks, start_worker

    ranks: Ranks = config["ranks"]
    more: Handover | None = config["more"]
    store, number = ranks.attempt.store, ranks.attempt.number
    if more is None and store.exists(ranks.outcome):
        return
    final = (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        Fenced,
    )
    with EventWriter(store, number) as events:
        try:
            requests = Requests(store, number)
            hooks = Hooks(
                emit=partial(events.emit, worker=True),
                flush=events.flush,
                stop_requested=requests.stop,
                saves_requested=requests.saves,
                fence=ranks.attempt.fence,
                attempt=number,
            )
            worker = start_worker(
                hooks,
                threads=ranks.threads,
                uses_gpu=ranks.uses_gpu,
                timeout_minutes=ranks.collective_minutes,
            )
            for stage in _stages(ranks, more, worker):
                ranks = stage
                if _run(ranks, worker) != "done":
                    break
        except Exception as error:
            if not isinstance(error, final) and not is_out_of_memory(error):
                if "timed out" in str(error).lower():
                    raise RanksApart(
                        "waited longer than resources.collective_minutes "
                        f"({ranks.collective_minutes:g}) for the other ranks"
                    ) from error
                raise  # a new start may mend it
            traceback.print_exc()
            _settle(
                store,
                ranks.outcome,
                {"status": "failed", "kind": type(error).__name__, "why": failure_reason(error)},
            )
            raise


def _stages(first: Ranks, more: Handover | None, worker: Worker) -> Iterator[Ranks]:
    """What this group works on, one stage after the other."""
    yield first
    for number in count(1):
        if more is None:
            return
        _free_memory()  # nothing is needed of the stage before
        found = pickle.loads(worker.share(more.take(number) if worker.is_main else None))
        if found is None:
            return
        yield found


def _free_memory() -> None:
    """Gives back what Python and the C library hold unused; what is measured after would reuse it
    unseen."""
    gc.collect()
    with suppress(OSError, AttributeError):  # needs glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _run(ranks: Ranks, worker: Worker) -> str:
    """One stage; the status of its outcome, also of one that was there before a restart."""
    from trainer.run_task import run_task
    from trainer.worker import Stopped

    store = ranks.attempt.store
    there = worker.is_main and store.exists(ranks.outcome)
    if before := worker.share(store.read_json(ranks.outcome)["status"] if there else None):
        return str(before)
    worker.emit("at_work", stage=ranks.stage, world=worker.world)
    try:
        results = [run_task(task, worker) for task in ranks.work]
        outcome: dict[str, Any] = {"status": "done", "results": results}
    except Stopped as stopped:
        outcome = {"status": "stopped", "why": str(stopped)}
    if worker.is_main:
        worker.hooks.flush()  # once the outcome is there the driver may leave, or go on
        _settle(store, ranks.outcome, outcome)
    return str(outcome["status"])


def _settle(store: Store, path: str, outcome: dict[str, Any]) -> None:
    store.create(path, json.dumps(outcome).encode())


def report_loss(
    store: Store, attempt: int, outcomes: Mapping[str, str], max_failures: int, what: str, why: str
) -> None:
    """Records that a group has lost workers; runs in Ray Train's controller.

    outcomes: of the stages that the group may work on, in order: it is at the first without one.
    """
    from cluster.storage import EventWriter

    stage = next((name for name in outcomes if not store.exists(outcomes[name])), [*outcomes][-1])
    print(f"{stage}: {what}: {why}")
    with EventWriter(store, attempt) as events:
        events.emit(
            "group_lost", stage=stage, what=what, why=why, max_failures=max_failures, worker=True
        )
