"""Training and capture as a group of Ray Train workers, from the driver's side; see `rank`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from cluster.capacity import Group, NotEnough, fit_group
from cluster.nodes import Draining
from cluster.spec import WorkerResources
from cluster.storage import Fenced, Store
from cluster.workers import Launch
from jobs.errors import Interrupted, SpecErrors
from jobs.run.context import Context, WaitingGroup
from jobs.run.requests import ask_save, ask_stop
from jobs.run.waiting import Placement
from jobs.stages.rank import Ranks, rank_main, report_loss

# Stages whose workers may stay for the one after, and that.
FOLLOWERS = {"capture": "distill"}
# How often the driver looks whether a group has ended its stage, beside what it says.
OUTCOME_SECONDS = 1.0


class GroupFailed(RuntimeError):
    """The workers failed; the message is one line for the user."""


def run_ranks(
    context: Context, stage: str, work: Sequence[Any], asked: WorkerResources
) -> tuple[list[dict[str, Any]], Group]:
    """Runs `work` on a group of workers; returns the results of each, and the group.

    Where the stage after this one is to have equal workers, they stay for it. Raises Interrupted
    after a clean stop, SpecErrors where the cluster is too small, GroupFailed for everything else
    that ends the group.
    """
    # Answers are generated on the workers of capture, and by that name a user knows them.
    group = _fit(context, "capture" if stage == "prepare" else stage, asked)
    outcome = _outcome(context, stage)
    minutes = context.spec.resources.collective_minutes
    ranks = Ranks(stage, work, context.attempt, outcome, group.cpus, group.gpus > 0, minutes)
    found: dict[str, Any] = {}
    failure, follower, there = None, None, context.waiting
    if there is not None and there.fits(stage, group):
        context.waiting, launch = None, there.launch
        launch.hand(ranks)
        launch.hand(None)
        found, failure = _watch(context, stage, launch, group, outcome, stays=False)
    if not found and failure is None:  # none was there, or it has given up waiting just now
        context.release()
        follower = _follower(context, stage, group)
        launch = _launch(context, stage, ranks, group, follower)
        stays = follower is not None
        found, failure = _watch(context, stage, launch, group, outcome, stays)
    context.pump()
    context.heartbeat.update(waits=None, restarting=None)
    if not found:
        why = " ".join(str(failure).split())[:600] if failure else "its workers left no outcome"
        raise GroupFailed(why) from failure
    if found["status"] == "stopped":
        raise Interrupted(found["why"])
    if found["status"] == "failed" and found["kind"] == "Fenced":
        raise Fenced(found["why"].removeprefix("Fenced: "))
    if found["status"] == "failed":
        raise GroupFailed(f"{found['kind']}: {found['why']}") from failure
    if follower is not None:
        context.waiting = WaitingGroup(launch, group, follower)
    return found["results"], group


def _fit(context: Context, key: str, asked: WorkerResources) -> Group:
    try:
        return fit_group(key, asked, context.cluster)
    except NotEnough as error:
        raise SpecErrors([str(error)]) from error


def _outcome(context: Context, stage: str) -> str:
    return f"state/launches/{context.attempt.number:04d}-{stage}.json"


def _follower(context: Context, stage: str, group: Group) -> str | None:
    """The stage that can have the group after this one, if it comes.

    Not on GPUs: there new processes start with all of their memory.
    """
    follower = FOLLOWERS.get(stage)
    if follower is None or follower not in context.to_run or group.gpus:
        return None
    same = _fit(context, follower, getattr(context.spec.resources, follower)) == group
    return follower if same else None


def _launch(
    context: Context, stage: str, ranks: Ranks, group: Group, follower: str | None
) -> Launch:
    attempt, most = context.attempt, context.spec.resources.max_failures
    outcomes = {name: _outcome(context, name) for name in (stage, follower) if name is not None}
    context.emit(
        "launch",
        stage=stage,
        workers=group.workers,
        **({} if group.fewest is None else {"fewest": group.fewest}),
        cpus=group.cpus,
        gpus=group.gpus,
    )
    return Launch(
        rank_main,
        {"ranks": ranks},
        group,
        f"{context.spec.name}-{stage}-{attempt.number:04d}",
        most,
        collective_minutes=ranks.collective_minutes,
        on_loss=partial(report_loss, attempt.store, attempt.number, outcomes, most),
        stays=follower is not None,
    )


def _watch(
    context: Context, stage: str, launch: Launch, group: Group, outcome: str, stays: bool
) -> tuple[dict[str, Any], BaseException | None]:
    """How the group ended the stage, {} where it left no word, and why it failed.

    Returns before the group has ended where it stays, and where it has stopped as it was asked to:
    Ray Train would take some ten seconds to end.
    """
    store, number = context.attempt.store, context.attempt.number
    at_work, asked_to_stop, next_look = False, False, 0.0
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
            context.heartbeat.update(waits="stopping: the state is saved first")
            ask_stop(store, number, stage=stage)
        if (stays or asked_to_stop) and time.monotonic() >= next_look:
            next_look = time.monotonic() + OUTCOME_SECONDS
            found: dict[str, Any] = {}
            with suppress(Exception):  # a storage that is away for a moment
                found = _read_outcome(store, outcome)
            if found.get("status") == "stopped" or (stays and found.get("status") == "done"):
                return found, None
        with suppress(Exception):  # a notice that cannot be read or passed on ends nothing
            for notice in draining.poll():
                _save_before(context, stage, str(notice))
    failure = launch.error()
    return _read_outcome(store, outcome), failure


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
