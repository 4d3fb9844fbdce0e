"""How a run is, in words, from what it has published and what Ray says of its job."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, replace
from typing import Any

from cluster.nodes import not_installed
from cluster.ray_jobs import RayJob, RayJobs, Unreachable
from cluster.storage import Attempt, Store
from jobs.monitor.submissions import Submission, last_submission
from jobs.run.heartbeat import LOST_SECONDS, SIGN_SECONDS, in_words, live_path
from jobs.run.requests import asked

LIVE = ("running", "waiting", "restarting", "stopping", "queued")


@dataclass(frozen=True)
class Status:
    """How a run is now.

    word: queued, waiting, running, restarting, stopping, stopped, done, failed, lost, or unknown.
    why: one line more, may be empty. since: Unix seconds of the attempt's start, 0 if unknown.
    """

    word: str
    why: str
    attempt: int
    stage: str | None = None
    since: float = 0.0
    ended: float | None = None
    host: str | None = None
    submission: Submission | None = None
    ray: str | None = None  # what Ray calls the status of its job

    @property
    def live(self) -> bool:
        """Whether the run has not ended."""
        return self.word in LIVE


def status_of(run: Store, *, ask_ray: bool = True) -> Status:
    """How a run is; `ask_ray`: also asks the cluster that it was sent to, where that answers."""
    last = last_submission(run)
    attempt = Attempt.latest(run)
    told = _told(run, attempt)
    job, silent = _ray_job(last) if last is not None and ask_ray else (None, "")
    found = _of_driver(run, attempt, told)
    mine = last is not None and told.get("job") == last.id
    unheard = last is not None and not mine and attempt <= last.attempt
    if last is not None and (mine or unheard):
        found = _with_ray(found, last, job, silent, unheard, told.get("tries_left", 0))
    return found


def _told(run: Store, attempt: int) -> dict[str, Any]:
    """What the newest attempt's driver has published; {} of a run of an earlier version."""
    path = live_path(attempt)
    told: dict[str, Any] = run.read_json(path) if attempt and run.exists(path) else {}
    return told


def _of_driver(run: Store, attempt: int, told: dict[str, Any]) -> Status:
    """What the driver says of itself."""
    if not told:
        return _of_events(run, attempt)
    word, why = told["status"], told.get("error") or ""
    common: dict[str, Any] = {
        "attempt": attempt,
        "stage": told.get("stage"),
        "since": told["began"],
        "host": told["host"],
        "ended": told.get("ended"),
    }
    if word != "running":
        return Status(word, why or _after(word, told), **common)
    silent = time.time() - told["t"]
    here = told["host"] == socket.gethostname()
    # Not by the number alone: another container of the same name has numbers of its own.
    gone = here and silent > SIGN_SECONDS + 5 and not _alive(told["pid"], told["began"])
    if gone or silent > LOST_SECONDS:
        where = f"process {told['pid']} on {told['host']}"
        sign = "is gone" if gone else f"gave no sign for {silent:.0f} s"
        return Status("lost", f"{where} {sign}; the same command continues it", **common)
    if told.get("restarting"):
        wait = f" ({told['waits']})" if told.get("waits") else ""
        return Status("restarting", told["restarting"] + wait, **common)
    if asked(run, attempt).stop:
        return Status("stopping", "the state is saved first", **common)
    if told.get("waits"):
        return Status("waiting", told["waits"], **common)
    return Status("running", in_progress(told), **common)


def in_progress(told: dict[str, Any]) -> str:
    """ "step 120 of 400", "cell 3 of 12, 1 failed, ..., about 3 min left", or nothing."""
    progress = told.get("progress") or {}
    if not progress:
        return ""
    words = [_count(progress, told)]
    words += [f"{task['key']}: {task['words']}" for task in progress.get("tasks", ())]
    if progress.get("left_s") is not None:
        words.append(in_words(progress["left_s"]))
    return ", ".join(words)


def _count(progress: dict[str, Any], told: dict[str, Any]) -> str:
    done, total = progress["done"], progress["total"]
    if progress["stage"] == "sweep":
        failed = told.get("failed_cells", 0)
        return f"cell {min(done + 1, total)} of {total}, {failed} failed"
    if progress["unit"] == "steps":
        name = "" if progress["stage"] in (None, "distill") else f" of the {progress['stage']}"
        return f"step {done} of {total}{name}"
    return f"{done} of {total} {progress['unit']}"


def _after(word: str, told: dict[str, Any]) -> str:
    if word == "done":
        return f"in {told.get('ended', told['t']) - told['began']:.0f} s"
    return ""


def _of_events(run: Store, attempt: int) -> Status:
    """Of a run that publishes nothing but events: how it ended, if it has."""
    from cluster.storage import read_events

    events = [e for e in read_events(run) if e["attempt"] == attempt]
    starts = [e["t"] for e in events if e["event"] == "run_start"]
    since = starts[0] if starts else 0.0
    ends = [e for e in events if e["event"] == "run_end"]
    if ends:
        word = {"interrupted": "stopped"}.get(ends[-1]["status"], ends[-1]["status"])
        return Status(word, "", attempt, since=since, ended=ends[-1]["t"])
    return Status("unknown", "no process of it has said anything", attempt, since=since)


def _with_ray(
    found: Status,
    last: Submission,
    job: RayJob | None,
    silent: str,
    unheard: bool,
    tries_left: int,
) -> Status:
    """Adds what Ray says of the job. unheard: its driver has not said anything yet."""
    if unheard:  # what the attempt before did is another matter
        found = replace(found, stage=None, since=last.sent_at, ended=None, host=None)
    if silent:
        word = "unknown" if unheard else found.word
        why = f"{found.why}; {silent}" if found.why else silent
    elif job is None:
        word, why = _unknown_to_ray(found, last, unheard)
    elif unheard:
        word, why = _of_job(job)
    else:
        word, why = _of_both(found, job, tries_left)
    return replace(
        found,
        word=word,
        why=why,
        ended=None if word in LIVE else found.ended,
        submission=last,
        ray=job.status if job else None,
    )


def _unknown_to_ray(found: Status, last: Submission, unheard: bool) -> tuple[str, str]:
    if not (unheard or found.live or found.word == "lost"):
        return found.word, found.why  # it had ended by then
    return "lost", (
        f"the cluster at {last.address} does not know the job {last.id} any more, it was "
        "restarted; submit it again to continue"
    )


def _of_job(job: RayJob) -> tuple[str, str]:
    """What Ray says of a job whose driver has not spoken."""
    why = _shortly(job.message) or f"Ray says {job.status}"
    if job.live:
        return "queued", why
    return ("stopped" if job.status == "STOPPED" else "failed"), why


def _of_both(found: Status, job: RayJob, tries_left: int) -> tuple[str, str]:
    """What a driver says of itself, and Ray of its job."""
    if job.live and found.word == "failed" and tries_left:
        return "restarting", f"{found.why} (Ray says {job.status})"
    if job.live and found.word == "lost":  # it may be started again, and can be stopped
        return "waiting", f"{found.why} (Ray says {job.status})"
    if job.live or not (found.live or found.word == "lost"):
        return found.word, found.why
    if job.status == "STOPPED":
        return "stopped", "ended by Ray; submit again to continue"
    return "lost", f"its driver ended without a word, Ray says {job.status}; submit to continue"


def _shortly(message: str) -> str:
    """What Ray says of a job, in one line: of a log that it repeats, the last line."""
    if missing := not_installed(message):
        return missing
    head, logs, tail = message.partition("last available logs")
    if not logs:
        return " ".join(message.split())[:300]
    lines = [line for line in tail.splitlines() if line.strip()]
    return f"{' '.join(head.split()).rstrip(',')}: {lines[-1].strip() if lines else ''}"[:400]


def _ray_job(last: Submission) -> tuple[RayJob | None, str]:
    """What Ray knows of a job, or why it cannot be asked."""
    try:
        return RayJobs(last.address).find(last.id), ""
    except Unreachable:
        return None, f"the cluster at {last.address} does not answer"


def _alive(pid: int, began: float) -> bool:
    """Whether a process of this machine lives, and is not a newer one of the same number."""
    import psutil

    if pid == os.getpid():
        return True
    try:
        process = psutil.Process(pid)
        return process.create_time() <= began + 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
