"""`stillhouse stop`: asks a run to save its state and end, and waits until it has."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.rayjobs import LIVE_IN_RAY, RayJobs, Unreachable
from cluster.storage import Store
from jobs.errors import SpecErrors
from jobs.live.requests import ask_stop
from jobs.live.status import Status, status_of

POLL_SECONDS = 1.0
# A job that Ray has not started yet is given so long to come to its first word.
QUEUED_SECONDS = 20.0


def stop_run(run: Store, wait_s: float, force: bool, say: Callable[[str], None]) -> Status:
    """Asks the newest attempt to stop; returns how the run is in the end, or after `wait_s`.

    force: a submitted job that has not ended by then is ended by Ray. Raises SpecErrors for a run
    that is not under way.
    """
    status = status_of(run)
    if not status.live:
        raise SpecErrors([f"{run.name}: is not under way: {in_words(status)}"])
    if status.word == "queued":
        say(f"{run.name}: is queued; taken back")
        _end_job(status)
        return _wait(run, QUEUED_SECONDS)
    ask_stop(run, status.attempt, by="stillhouse stop")
    say(f"{run.name}: asked to stop; it saves its state first")
    found = _wait(run, wait_s)
    if found.live and not force:
        raise SpecErrors(
            [
                f"{run.name}: has not stopped within {wait_s:.0f} s ({in_words(found)}); wait "
                "longer with --wait SECONDS, or end a submitted job at once with --force"
            ]
        )
    if found.submission is not None:
        _end_job(found)  # else Ray takes what has stopped for failed
        found = _wait(run, QUEUED_SECONDS, ray_too=True)
    elif found.live:
        raise SpecErrors(
            [f"{run.name}: --force is for submitted jobs; end process on {found.host} yourself"]
        )
    return found


def _wait(run: Store, seconds: float, ray_too: bool = False) -> Status:
    """How a run is when it has ended (ray_too: and Ray has noticed), or after so long."""
    ends = time.monotonic() + seconds
    while True:
        found = status_of(run)
        going = found.live or (ray_too and found.ray in LIVE_IN_RAY)
        if not going or time.monotonic() >= ends:
            return found
        time.sleep(POLL_SECONDS)


def _end_job(status: Status) -> None:
    sent = status.submission
    if sent is None:
        return
    try:
        jobs = RayJobs(sent.address)
        job = jobs.find(sent.id)
        if job is not None and job.live:
            jobs.stop(sent.id)
    except Unreachable as error:
        raise SpecErrors([str(error)]) from error


def in_words(status: Status) -> str:
    """A status in a few words."""
    stage = f" in {status.stage}" if status.stage and status.live else ""
    return f"{status.word}{stage}" + (f", {status.why}" if status.why else "")
