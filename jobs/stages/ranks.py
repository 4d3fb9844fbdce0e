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
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.spec import WorkerResources
from cluster.storage import Attempt, Fenced, Store
from cluster.workers import COLLECTIVE_TIMEOUT_MINUTES, Group, Launch, NotEnough, fit_group
from jobs.errors import Interrupted, SpecErrors
from jobs.stages.base import Context, stop_path

# After so long without a word from the workers the user hears what they wait for.
WAITING_SECONDS = 90.0


class GroupFailed(RuntimeError):
    """The workers failed; the message is one line for the user."""


@dataclass(frozen=True)
class Ranks:
    """What the ranks of one launch do: `run(worker)` of each of `work`, one after the other."""

    work: Sequence[Any]
    attempt: Attempt
    outcome: str
    threads: int
    uses_gpu: bool


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
            hooks = Hooks(
                emit=partial(events.emit, worker=True),
                flush=events.flush,
                stop_requested=Poll(partial(store.exists, stop_path(number))),
                fence=ranks.attempt.fence,
                attempt=number,
            )
            worker = start_worker(
                hooks,
                threads=ranks.threads,
                uses_gpu=ranks.uses_gpu,
                timeout_minutes=COLLECTIVE_TIMEOUT_MINUTES,
            )
            try:
                results = [job.run(worker) for job in ranks.work]
                outcome: dict[str, Any] = {"status": "done", "results": results}
            except Stopped as stopped:
                outcome = {"status": "stopped", "why": str(stopped)}
            if worker.is_main:
                _settle(store, ranks.outcome, outcome)
        except Exception as error:
            if not isinstance(error, final) and not is_out_of_memory(error):
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


class Poll:
    """A question to storage, asked at most once a second; a yes stays."""

    def __init__(self, ask: Any, every_s: float = 1.0) -> None:
        self._ask, self._every = ask, every_s
        self._next, self._answer = 0.0, False

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self._answer and now >= self._next:
            self._answer = bool(self._ask())
            self._next = time.monotonic() + self._every
        return self._answer


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
    ranks = Ranks(work, attempt, outcome, group.cpus, group.gpus > 0)
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
        context.spec.resources.max_failures,
    )
    began, at_work, asked_to_stop, warned = time.monotonic(), False, False, False
    while not launch.wait(0.3):
        at_work = context.pump() or at_work
        if context.stop.is_set() and not at_work:
            raise Interrupted(f"{stage} stopped before its workers were at work")
        if context.stop.is_set() and not asked_to_stop:
            asked_to_stop = True
            context.reporter.say(f"{stage}: stopping; the state is saved first")
            attempt.store.write_json(stop_path(attempt.number), {"stage": stage})
        if not at_work and not warned and time.monotonic() - began > WAITING_SECONDS:
            warned = True
            context.reporter.say(
                f"{stage}: still waiting for {group} (`ray status` shows what is free)"
            )
    failure = launch.error()
    context.pump()
    if not attempt.store.exists(outcome):
        why = " ".join(str(failure).split())[:600] if failure else "its workers left no outcome"
        raise GroupFailed(why) from failure
    found = attempt.store.read_json(outcome)
    if found["status"] == "stopped":
        raise Interrupted(found["why"])
    if found["status"] == "failed" and found["kind"] == "Fenced":
        raise Fenced(found["why"])
    if found["status"] == "failed":
        raise GroupFailed(f"{found['kind']}: {found['why']}") from failure
    return found["results"], group
