"""`stillhouse stop`: asks a run to save its state and end, and waits until it has."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from cluster.ray_jobs import LIVE_IN_RAY, RayJobs, Unreachable
from cluster.storage import Store
from jobs.errors import SpecErrors
from jobs.monitor.status import Status, status_of
from jobs.run.requests import ask_kill, ask_stop

POLL_SECONDS = 1.0
# So long Ray takes to notice that a job has ended, and a driver to end at once.
NOTICE_SECONDS = 30.0


def stop_run(run: Store, wait_s: float, force: bool, say: Callable[[str], None]) -> Status:
    """Asks a run to stop; returns how it is in the end. force: after `wait_s` it ends at once.

    Raises SpecErrors for a run that is not under way, and for one that has not ended.
    """
    status = status_of(run)
    if not status.live:
        raise SpecErrors([f"{run.name}: is not under way: {in_words(status)}"])
    if status.word == "queued":
        say(f"{run.name}: is queued; taken back")
        _end_job(status)
        return _ended(run, _wait(run, NOTICE_SECONDS, lambda attempt: None))
    say(f"{run.name}: asked to stop; it saves its state first")
    found = _wait(run, wait_s, lambda attempt: ask_stop(run, attempt, by="stillhouse stop"))
    if found.live and force:
        say(f"{run.name}: ended at once")
        found = _wait(run, NOTICE_SECONDS, lambda attempt: ask_kill(run, attempt))
    if not found.live or force:
        with contextlib.suppress(Unreachable):  # the run has ended all the same
            _end_job(found)  # else Ray takes what has stopped for failed
        found = _wait(run, NOTICE_SECONDS, lambda attempt: None, ray_too=True)
    return _ended(run, found)


def _ended(run: Store, found: Status) -> Status:
    if found.live:
        raise SpecErrors(
            [
                f"{run.name}: has not stopped yet ({in_words(found)}); wait longer with --wait "
                "SECONDS, or end it at once with --wait 0 --force"
            ]
        )
    return found


def _wait(
    run: Store, seconds: float, ask: Callable[[int], object], ray_too: bool = False
) -> Status:
    """How a run is when it has ended (ray_too: and Ray has noticed), or after so long.

    ask: is called for the newest attempt; where that was lost, the next one is asked too.
    """
    ends = time.monotonic() + seconds
    while True:
        found = status_of(run)
        going = found.live or (ray_too and found.ray in LIVE_IN_RAY)
        if going and found.attempt:
            ask(found.attempt)
        if not going or time.monotonic() >= ends:
            return found
        time.sleep(POLL_SECONDS)


def _end_job(status: Status) -> None:
    """Has Ray end the job of a run, if it has one that is live. Raises Unreachable."""
    sent = status.submission
    if sent is None:
        return
    jobs = RayJobs(sent.address)
    job = jobs.find(sent.id)
    if job is not None and job.live:
        jobs.stop(sent.id)


def in_words(status: Status) -> str:
    """A status in a few words."""
    stage = f" in {status.stage}" if status.stage and status.live else ""
    return f"{status.word}{stage}" + (f", {status.why}" if status.why else "")
