"""Sends the checkout and a spec to a Ray cluster, once, as a Ray job."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.ray_jobs import RayJob, RayJobs, Unreachable
from cluster.session import Cluster
from cluster.storage import Attempt, Store
from cluster.storage.keys import fingerprint, flatten
from cluster.storage.store import format_bytes
from cluster.working_dir import TooLarge, check_size, checkout, stage, travelling
from jobs.errors import SpecErrors
from jobs.monitor.status import status_of
from jobs.monitor.submissions import Submission, job_id, last_submission, record, take_back
from jobs.pipeline import preflight
from jobs.pipeline.pipeline import Job
from jobs.run.directory import differences
from jobs.run.heartbeat import JOB
from jobs.spec.job import JobSpec
from jobs.spec.load import dump_spec
from jobs.submit.portable import portable

_LOCK, _PROJECT = "requirements.lock", "pyproject.toml"
_DRIVERS = {"s3": "s3", "gs": "gcs", "abfs": "azure"}  # extras of the project, by URL
# Where Ray unpacks the checkout; pip puts the variable's value in.
_THERE = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"
# Wheels of CUDA are gigabytes; Ray's own limit is 10 minutes.
_INSTALL_S = 3600


def locked_environment(spec: JobSpec, root: Path) -> dict[str, Any]:
    """The fields of Ray's runtime environment, for a checkout in the folder `root`.

    Packages are those that the job imports, in the versions of the lock file, which has those of
    tests and benches as well. Ray itself stays the cluster's: a job that brings another one fails.
    """
    return {
        "pip": {"packages": requirements(spec, root), "pip_check": False},
        "config": {"setup_timeout_seconds": _INSTALL_S},
    }


def requirements(spec: JobSpec, root: Path) -> list[str]:
    """The lines of a requirements file."""
    project = tomllib.loads((root / _PROJECT).read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in _extras(spec):
        wanted += project["optional-dependencies"][extra]
    # Ray keeps an environment under a digest of these lines: that of the lock file is one of them.
    digest = hashlib.sha256((root / _LOCK).read_bytes()).hexdigest()
    lines = [f"--constraint {_THERE}/{_LOCK} # sha256 {digest}"]
    return lines + [each for each in wanted if re.split(r"[^\w-]", each, maxsplit=1)[0] != "ray"]


def _extras(spec: JobSpec) -> list[str]:
    text = dump_spec(spec)
    extras = [extra for scheme, extra in _DRIVERS.items() if f"{scheme}://" in text]
    return extras + ["tasks"] * (spec.sweep is not None and bool(spec.sweep.tasks))


SPEC_FILE = "stillhouse-job.yaml"
RUN_KEY = "stillhouse_run"  # in the metadata of a Ray job: which run it is of
# So long a run may take to save its state when its job is stopped.
STOP_SECONDS = 600
# A sending that is recorded but not known to Ray may be on its way for so long.
SENDING_SECONDS, POLL_SECONDS = 180.0, 1.0


@dataclass(frozen=True)
class How:
    """How a job is sent. environment: image or lock; forward: variables to send along;
    shared: folders that all machines have; until, only, redo: as of `run`."""

    environment: str = "image"
    retries: int = 2
    forward: Mapping[str, str] = field(default_factory=dict, repr=False)
    shared: Sequence[str] = ()
    until: str | None = None
    only: str | None = None
    redo: str | None = None


@dataclass(frozen=True)
class Sent:
    """A job that is on its cluster. joined: it was there before."""

    submission: Submission
    joined: bool


def submit(job: Job, jobs: RayJobs, how: How, say: Callable[[str], None]) -> Sent:
    """Sends a job, or joins the same one that is live. Raises SpecErrors; then nothing was sent."""
    spec = portable(job, how.shared)
    if not spec.resources.growth_minutes:  # else the run waits for the cluster to grow
        preflight.resources(spec, job.selection.to_run, _cluster(jobs))
    _refuse_running(job.run.store)
    run, values = job.run.store, spec.model_dump(mode="json")
    # Where work runs, and how it is tracked, may differ between two that are the same job.
    same = {k: v for k, v in values.items() if k not in ("resources", "tracking")}
    asked = {"until": how.until, "only": how.only, "redo": how.redo}
    own_fingerprint = fingerprint({**flatten(same), **asked})
    while True:
        last = last_submission(run)
        job_of_last = _job_of(last, jobs, run)
        if last is not None and job_of_last is not None and job_of_last.live:
            return _join(last, job_of_last, own_fingerprint, values)
        number = 1 if last is None else last.number + 1
        while jobs.find(job_id(run.name, own_fingerprint, number)) is not None:
            number += 1  # of a run of this name whose folder is gone
        new = Submission(
            number=number,
            attempt=Attempt.latest(run),
            id=job_id(run.name, own_fingerprint, number),
            address=jobs.address,
            fingerprint=own_fingerprint,
            sent_at=time.time(),
            spec=values,
        )
        if not record(run, new):
            continue  # somebody else sends this run at this moment
        try:
            _send(new, spec, jobs, how, run, say)
        except BaseException:
            take_back(run, new)
            raise
        return Sent(new, joined=False)


def _job_of(last: Submission | None, jobs: RayJobs, run: Store) -> RayJob | None:
    """The Ray job of a run's last sending; one that is on its way is waited for.

    Raises SpecErrors where it is live on another cluster.
    """
    if last is None:
        return None
    there = jobs if last.address == jobs.address else _other(last.address)
    while True:
        found = there.find(last.id) if there is not None else None
        on_its_way = 0 <= time.time() - last.sent_at < SENDING_SECONDS
        has_begun = Attempt.latest(run) > last.attempt
        if found is not None or there is None or has_begun or not on_its_way:
            break
        time.sleep(POLL_SECONDS)
    if found is not None and found.live and there is not jobs:
        raise SpecErrors(
            [
                f"--address: the job {last.id} of this run is {found.status} at {last.address}; "
                "stop it first (stillhouse stop RUN), or send this to that cluster"
            ]
        )
    return found


def _other(address: str) -> RayJobs | None:
    try:
        return RayJobs(address)
    except Unreachable:
        return None  # a cluster that is gone


def _refuse_running(run: Store) -> None:
    """Raises SpecErrors if the run goes on without a Ray job: it would be stopped in its middle."""
    found = status_of(run, ask_ray=False)
    if found.live and found.submission is None:
        raise SpecErrors(
            [
                f"{run.name}: attempt {found.attempt} is {found.word} on {found.host}; stop it "
                f"first (stillhouse stop {run.name}), or give this one another name"
            ]
        )


def _join(last: Submission, live: RayJob, own_fingerprint: str, values: dict[str, Any]) -> Sent:
    """The live job of this run, if it is the same. Raises SpecErrors with the difference if not."""
    if last.fingerprint == own_fingerprint:
        return Sent(last, joined=True)
    changed = differences(flatten(last.spec), flatten(values))
    told = "; ".join(changed[:5]) or "other stages were asked for"
    raise SpecErrors(
        [
            f"{values['name']}: the job {live.id} of this run is {live.status} with another spec "
            f"({told}); stop it first (stillhouse stop {values['name']}), or give this one another "
            "name"
        ]
    )


def _send(
    new: Submission,
    spec: JobSpec,
    jobs: RayJobs,
    how: How,
    run: Store,
    say: Callable[[str], None],
) -> None:
    root = checkout()
    files = travelling(root)
    try:
        size = check_size(files, root)
    except TooLarge as error:
        raise SpecErrors([str(error)]) from None
    say(f"sending {len(files)} files of {root}, {format_bytes(size)}")
    variables = {
        # Read by the job's supervisor on the cluster.
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
        JOB: new.id,
        **how.forward,
    }
    environment: dict[str, Any] = {"env_vars": variables}
    if how.environment == "lock":
        environment |= locked_environment(spec, root)
    command = ["python", "-m", "jobs.submit.retry", str(how.retries + 1), "run", SPEC_FILE]
    command += ["--address", "auto"]
    for option in ("until", "only", "redo"):
        value = getattr(how, option)
        command += [f"--{option}", value] if value else []
    with tempfile.TemporaryDirectory(prefix="stillhouse-submit-") as folder:
        stage(root, list(files), Path(folder))
        (Path(folder) / SPEC_FILE).write_text(dump_spec(spec), encoding="utf-8")
        environment["working_dir"] = folder
        jobs.submit(new.id, shlex.join(command), environment, {RUN_KEY: run.url})


def forwarded(names: Sequence[str]) -> dict[str, str]:
    """The values of variables to send along. Raises SpecErrors for those that are not set."""
    faults = [
        f"--forward-env: got {name.partition('=')[0]}=..., may be the NAME of a variable that is "
        "set here; its value is not given on the command line, where others can read it"
        if "=" in name
        else f"--forward-env: {name} is not set here"
        for name in names
        if name not in os.environ
    ]
    if faults:
        raise SpecErrors(faults)
    return {name: os.environ[name] for name in names}


def _cluster(jobs: RayJobs) -> Cluster:
    """The cluster's nodes, as its dashboard tells them."""
    nodes = tuple((int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in jobs.nodes())
    return Cluster(jobs.address, nodes, embedded=False)
