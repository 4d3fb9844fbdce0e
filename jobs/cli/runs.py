"""`stillhouse list`, `status`, `watch`, `logs` and `stop`.

Only typer is imported here: each command imports what it needs, so that help answers at once.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.errors import Interrupted, SpecErrors

if TYPE_CHECKING:
    from cluster.storage import Store
    from jobs.monitor.status import Status

DONE, FAILED, INTERRUPTED = 0, 3, 130

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A name, path or URL.")]
StorageOption = Annotated[str, typer.Option(metavar="URL", help="Where runs given by name are.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_runs(storage: StorageOption = "./runs", as_json: JsonOption = False) -> int:
    """List runs, and how they are.

    Those of a storage, and those that were submitted from this machine.
    """
    from concurrent.futures import ThreadPoolExecutor

    from cluster.storage import open_store
    from jobs.monitor.follow import plain, table
    from jobs.monitor.submissions import remembered
    from jobs.run.directory import holds_run

    try:
        root = open_store(storage)
    except ValueError as error:
        raise SpecErrors([str(error)]) from None
    here = [root.sub(name) for name in root.list() if name[:1] not in "_."]
    runs = [run for run in here if holds_run(run)]
    runs += [run for run in remembered() if run not in runs and _is_there(run)]
    with ThreadPoolExecutor(8) as pool:
        found = list(zip(runs, pool.map(_status_or_why, runs), strict=True))
    found.sort(key=lambda pair: -pair[1].since)
    if as_json:
        typer.echo(json.dumps([plain(*pair) for pair in found], indent=2))
    elif not found:
        typer.echo(f"{storage} holds no runs, and none was submitted from this machine")
    else:
        _console().print(table(found))
    return DONE


def status(run: RunArgument, storage: StorageOption = "./runs", as_json: JsonOption = False) -> int:
    """Say how a run is, and why it waits."""
    from jobs.monitor.follow import detail, plain
    from jobs.monitor.status import status_of

    place = _find(run, storage, "status")
    found = status_of(place)
    if as_json:
        typer.echo(json.dumps(plain(place, found), indent=2))
    else:
        typer.echo("\n".join(detail(place, found)))
    return DONE


def watch(run: RunArgument, storage: StorageOption = "./runs") -> int:
    """Follow a run until it ends; Ctrl-C leaves it alone.

    Exit code as of `run`: 0 done, 3 failed or lost, 130 stopped.
    """
    return watch_run(_find(run, storage, "watch"))


def watch_run(place: Store) -> int:
    """Follows a run to its end; returns the exit code."""
    from rich.console import Console

    from jobs.monitor.follow import follow
    from jobs.monitor.stop import in_words

    console = Console(highlight=False)
    try:
        end = follow(place, console)
    except KeyboardInterrupt:
        raise Interrupted(
            f"no longer watched; {place.name} goes on (stillhouse status {place.name}, "
            f"stillhouse stop {place.name})"
        ) from None
    console.print(f"{place.name}: {in_words(end)}", markup=False, soft_wrap=True)
    if end.word == "done":
        from jobs.pipeline.pipeline import show_result
        from jobs.run.directory import RunDir

        show_result(console, RunDir(place))
        return DONE
    option = "" if end.attempt else " --job"
    print(f"log: stillhouse logs {place.name}{option}", file=sys.stderr)
    return INTERRUPTED if end.word == "stopped" else FAILED


def logs(
    run: RunArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run ends.")
    ] = False,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Of this attempt. Default: the newest.")
    ] = None,
    job: Annotated[
        bool, typer.Option("--job", help="Of a submitted run: what Ray has of its job instead.")
    ] = False,
    storage: StorageOption = "./runs",
) -> int:
    """Print what a run, Ray and the workers have written."""
    from cluster.storage import Attempt
    from jobs.monitor.status import status_of
    from jobs.run.log import read_log

    place = _find(run, storage, "logs")
    if job:
        return _job_log(place)
    latest = Attempt.latest(place)
    number = latest if attempt is None else attempt
    if not 0 < number <= latest:
        has = f"has {latest} attempts" if latest else "has not started yet"
        raise SpecErrors([f"--attempt: {run} {has}; see stillhouse logs --help"])
    out = sys.stdout.buffer

    look = {"next": 0.0, "going": True}

    def going() -> bool:  # asked often, and costs several requests
        if time.monotonic() >= look["next"]:
            found = status_of(place, ask_ray=False)
            look["going"] = found.live and found.attempt == number
            look["next"] = time.monotonic() + 5.0
        return bool(look["going"])

    wrote = False
    try:
        for piece in read_log(place, number, going if follow else None):
            out.write(piece)
            out.flush()
            wrote = True
    except KeyboardInterrupt:
        raise Interrupted("no longer followed; the run goes on") from None
    except BrokenPipeError:  # of a pager that was left
        sys.stderr.close()
        return DONE
    if not wrote:
        typer.echo(f"attempt {number} of {run} has no log in its run directory", err=True)
    return DONE


def stop(
    run: RunArgument,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long to wait until it has ended.")
    ] = 600.0,
    force: Annotated[
        bool, typer.Option("--force", help="End at once what has not stopped by then.")
    ] = False,
    storage: StorageOption = "./runs",
) -> int:
    """Ask a run to save its state and end.

    The next run or submit continues it.
    """
    from cluster.ray_jobs import Unreachable
    from jobs.monitor.stop import in_words, stop_run

    place = _find(run, storage, "stop")
    try:
        end = stop_run(place, wait, force, typer.echo)
    except Unreachable as error:
        raise SpecErrors([str(error)]) from error
    typer.echo(f"{place.name}: {in_words(end)}")
    return DONE


def _job_log(place: Store) -> int:
    from cluster.ray_jobs import RayJobs, Unreachable
    from jobs.monitor.submissions import last_submission

    sent = last_submission(place)
    if sent is None:
        raise SpecErrors([f"--job: {place.name} was not submitted; leave --job out"])
    try:
        jobs = RayJobs(sent.address)
        if jobs.find(sent.id) is None:
            raise SpecErrors(
                [f"--job: the cluster at {sent.address} does not know {sent.id} any more"]
            )
        typer.echo(jobs.log(sent.id))
    except Unreachable as error:
        raise SpecErrors([str(error)]) from error
    return DONE


def _find(run: str, storage: str, command: str) -> Store:
    """A run by URL, path, name in `storage`, or name of one that was submitted from here."""
    from jobs.monitor.submissions import remembered
    from jobs.run.directory import find_run

    try:
        return find_run(run, storage, command)
    except SpecErrors:
        for place in remembered():
            if place.name == run and _is_there(place):
                return place
        raise


def _status_or_why(place: Store) -> Status:
    """How a run is; of one that cannot be read, why."""
    from jobs.monitor.status import Status, status_of

    try:
        return status_of(place)
    except Exception as error:  # one of many must not hide the others
        return Status("unknown", " ".join(str(error).split())[:200], 0)


def _is_there(place: Store) -> bool:
    """Whether something of a remembered run is left, where its storage answers."""
    try:
        return place.exists("state")
    except Exception:  # each storage has errors of its own
        return False


def _console() -> Any:  # noqa: ANN401
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=max(console.width, 160))
    return console
