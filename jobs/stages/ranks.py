"""Training and capture as a group of Ray Train workers: the ranks' side, and the driver's.

How a group ended is an object on storage, `state/launches/<attempt>-<stage>.json`, created once:
by rank 0 when all is done or stopped, or by the first rank that met an error which a new start
cannot mend. A restarted group that finds it leaves at once.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.draining import Draining
from cluster.spec import WorkerResources
from cluster.storage import Attempt, Fenced, Store
from cluster.workers import Group, Launch, NotEnough, fit_group
from jobs.errors import Interrupted, SpecErrors
from jobs.live.requests import Requests, ask_save, ask_stop
from jobs.stages.base import Context
from jobs.stages.placement import Placement

# How often the driver looks whether a group that it has asked to stop has stopped.
OUTCOME_SECONDS = 1.0


class GroupFailed(RuntimeError):
    """The workers failed; the message is one line for the user."""


class RanksApart(RuntimeError):
    """Ranks have waited too long for each other."""


@dataclass(frozen=True)
class Ranks:
    """What the ranks of one launch do: `run(worker)` of each of `work`, one after the other."""

    stage: str
    work: Sequence[Any]
    attempt: Attempt
    outcome: str
    threads: int
    uses_gpu: bool
    collective_minutes: float


def rank_main(config: dict[str, Any]) -> None:
    """Entry point of every Ray Train worker."""
    from cluster.storage import EventWriter
    from trainer.news import is_out_of_memory, why_of
    from trainer.worker import Hooks, Stopped, start_worker

    ranks: Ranks = config["ranks"]
    store, number = ranks.attempt.store, ranks.attempt.number
    if store.exists(ranks.outcome):
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
            worker.emit("at_work", stage=ranks.stage, world=worker.world)
            try:
                results = [job.run(worker) for job in ranks.work]
                outcome: dict[str, Any] = {"status": "done", "results": results}
            except Stopped as stopped:
                outcome = {"status": "stopped", "why": str(stopped)}
            if worker.is_main:
                events.flush()  # once the outcome is there the driver may leave
                _settle(store, ranks.outcome, outcome)
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
                {"status": "failed", "kind": type(error).__name__, "why": why_of(error)},
            )
            raise


def _settle(store: Store, path: str, outcome: dict[str, Any]) -> None:
    store.create(path, json.dumps(outcome).encode())


def tell_loss(
    store: Store, attempt: int, stage: str, max_failures: int, what: str, why: str
) -> None:
    """Records that a group has lost workers; runs in Ray Train's controller."""
    from cluster.storage import EventWriter

    print(f"{stage}: {what}: {why}")
    with EventWriter(store, attempt) as events:
        events.emit(
            "group_lost", stage=stage, what=what, why=why, max_failures=max_failures, worker=True
        )


def run_ranks(
    context: Context, stage: str, work: Sequence[Any], asked: WorkerResources
) -> tuple[list[dict[str, Any]], Group]:
    """Runs `work` on a group of workers; returns the results of each, and the group.

    Raises Interrupted after a clean stop, SpecErrors where the cluster is too small, GroupFailed
    for everything else that ends the group.
    """
    try:
        # Answers are generated on the workers of capture, and by that name a user knows them.
        key = "capture" if stage == "prepare" else stage
        group = fit_group(key, asked, context.cluster)
    except NotEnough as error:
        raise SpecErrors([str(error)]) from error
    attempt = context.attempt
    outcome = f"state/launches/{attempt.number:04d}-{stage}.json"
    limits = context.spec.resources
    patience = limits.collective_minutes
    ranks = Ranks(stage, work, attempt, outcome, group.cpus, group.gpus > 0, patience)
    context.emit(
        "launch",
        stage=stage,
        workers=group.workers,
        **({} if group.fewest is None else {"fewest": group.fewest}),
        cpus=group.cpus,
        gpus=group.gpus,
    )
    launch = Launch(
        rank_main,
        {"ranks": ranks},
        group,
        f"{context.spec.name}-{stage}-{attempt.number:04d}",
        limits.max_failures,
        collective_minutes=patience,
        on_loss=partial(tell_loss, attempt.store, attempt.number, stage, limits.max_failures),
    )
    at_work, asked_to_stop, stopped, next_look = False, False, False, 0.0
    placement, draining = Placement(context, stage, group), Draining()
    while not launch.wait(0.3):
        for event in context.pump():
            at_work = event["event"] != "group_lost"
        placement.look(at_work)
        if context.stop.is_set() and not at_work:
            raise Interrupted(f"{stage} stopped before its workers were at work")
        if context.stop.is_set() and not asked_to_stop:
            asked_to_stop = True
            context.reporter.say(f"{stage}: stopping; the state is saved first")
            context.beacon.tell(waits="stopping: the state is saved first")
            ask_stop(attempt.store, attempt.number, stage=stage)
        if asked_to_stop and time.monotonic() >= next_look:
            next_look = time.monotonic() + OUTCOME_SECONDS
            with suppress(Exception):  # a storage that is away for a moment
                stopped = _read_outcome(attempt.store, outcome).get("status") == "stopped"
            if stopped:  # all ranks have saved; Ray Train would take some ten seconds to end
                break
        with suppress(Exception):  # a notice that cannot be read or passed on ends nothing
            for notice in draining.news():
                _save_before(context, stage, str(notice))
    failure = None if stopped else launch.error()
    context.pump()
    context.beacon.tell(waits=None, restarting=None)
    found = _read_outcome(attempt.store, outcome)
    if not found:
        why = " ".join(str(failure).split())[:600] if failure else "its workers left no outcome"
        raise GroupFailed(why) from failure
    if found["status"] == "stopped":
        raise Interrupted(found["why"])
    if found["status"] == "failed" and found["kind"] == "Fenced":
        raise Fenced(found["why"].removeprefix("Fenced: "))
    if found["status"] == "failed":
        raise GroupFailed(f"{found['kind']}: {found['why']}") from failure
    return found["results"], group


def _read_outcome(store: Store, path: str) -> dict[str, Any]:
    """How a group ended; {} while it has not."""
    found: dict[str, Any] = store.read_json(path) if store.exists(path) else {}
    return found


def _save_before(context: Context, stage: str, notice: str) -> None:
    """Has a training save now, as one of the cluster's nodes is about to go."""
    context.saves_asked += 1
    context.reporter.say(f"{stage}: {notice}; a checkpoint is saved now")
    context.emit("preemption", stage=stage, notice=notice)
    ask_save(context.attempt.store, context.attempt.number, context.saves_asked, why=notice)
