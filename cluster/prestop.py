"""Lets a job stop cleanly before its pods go: the preStop hook of the pods of a RayJob.

    python -m cluster.prestop --seconds 560 -- python -m jobs run /etc/stillhouse/spec.yaml
    python -m cluster.prestop --seconds 560

Kubernetes ends all pods of a cluster at once, and KubeRay does not stop the job before it. So the
head's hook, the first, sends SIGTERM to the job's process, whose workers then save a checkpoint,
and waits for its end. The hook of the other pods, the second, waits until Ray has no work on them.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial

import psutil

POLL_S = 0.5
# Called like work of Ray, but of no job: waiting workers, and the agents of the node.
NO_WORK = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
_GONE = (psutil.NoSuchProcess, psutil.AccessDenied)


def terminate(entrypoint: Sequence[str]) -> list[psutil.Process]:
    """Sends SIGTERM to the processes with these arguments, and returns them.

    The first word, the interpreter, may be another path.
    """
    told = []
    for process in psutil.process_iter():
        with contextlib.suppress(*_GONE):
            if process.cmdline()[1:] == list(entrypoint[1:]):
                process.terminate()
                told.append(process)
    return told


def ray_at_work() -> bool:
    """Whether a task or an actor of Ray is on this machine: such processes are called `ray::`.

    On a head this is always so, as some actors outlive the jobs.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(*_GONE):
            title = "".join(process.cmdline()[:1])
            if title.startswith("ray::") and not title.startswith(NO_WORK):
                return True
    return False


def wait_while(busy: Callable[[], bool], seconds: float) -> bool:
    """Waits until `busy` says no; False when time was up before."""
    until = time.monotonic() + seconds
    while busy():
        if time.monotonic() >= until:
            return False
        time.sleep(POLL_S)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 always: what Kubernetes does next does not depend on it."""
    parser = argparse.ArgumentParser(prog="python -m cluster.prestop")
    parser.add_argument("--seconds", type=float, required=True, help="wait no longer")
    parser.add_argument("entrypoint", nargs="*", help="on the head: the job's command, after --")
    options = parser.parse_args(arguments)
    if options.entrypoint:
        wait_while(partial(_any_runs, terminate(options.entrypoint)), options.seconds)
    else:
        wait_while(ray_at_work, options.seconds)
    return 0


def _any_runs(processes: Sequence[psutil.Process]) -> bool:
    # A process that has ended stays in the table until its parent asks for its exit code.
    for process in processes:
        with contextlib.suppress(*_GONE):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


if __name__ == "__main__":
    raise SystemExit(main())
