"""The job's side of W&B: picks the mode, starts the projection, never fails with it."""

from __future__ import annotations

import contextlib
import netrc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

MODES = ("auto", "online", "offline", "disabled")
SYNONYMS = {"dryrun": "offline", "run": "online", "shared": "online"}
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # where `wandb login` logs in by default


def resolve(mode: str, environment: Mapping[str, str] = os.environ) -> str:
    """online, offline or disabled.

    Disabled, in the spec or by WANDB_MODE or WANDB_DISABLED, always holds; then WANDB_MODE; then
    `mode`; auto is online where there is a login, else offline. Raises ValueError otherwise.
    """
    if mode not in MODES:
        raise ValueError(f"tracking.mode: {mode!r} is no mode; may be {', '.join(MODES)}")
    from_environment = environment.get("WANDB_MODE", "").strip().lower()
    from_environment = SYNONYMS.get(from_environment, from_environment)
    if from_environment and from_environment not in MODES:
        raise ValueError(
            f"WANDB_MODE: {from_environment!r} is no mode; may be {', '.join(MODES[1:])}"
        )
    off = environment.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "on")
    if off or "disabled" in (mode, from_environment):
        return "disabled"
    chosen = from_environment if from_environment not in ("", "auto") else mode
    if chosen == "auto":
        return "online" if has_login(environment) else "offline"
    return chosen


def has_login(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether wandb would find an API key, an identity token or a netrc entry; reads no key out."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    base = environment.get("WANDB_BASE_URL")
    hosts = (urlsplit(base).netloc,) if base else HOSTS
    home = Path(environment.get("HOME") or Path.home())
    named = environment.get("NETRC")
    for path in [Path(named)] if named else [home / ".netrc", home / "_netrc"]:
        try:
            entries = netrc.netrc(str(path)).hosts
        except (OSError, netrc.NetrcParseError):
            continue
        if any(host in entries for host in hosts):
            return True
    return False


def default_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where offline runs go when nothing else is said: `$WANDB_DIR/wandb`, or `./wandb`."""
    return Path(environment.get("WANDB_DIR") or Path.cwd()).expanduser().absolute() / "wandb"


ROOT = Path(__file__).resolve().parents[2]  # the checkout, where `jobs` is imported from


def project_run(
    run_url: str,
    mode: str = "auto",
    project: str = "stillhouse",
    entity: str | None = None,
    tags: Sequence[str] = (),
    out_dir: str | os.PathLike[str] | None = None,
    timeout: float = 120.0,
) -> str:
    """Project a run directory into W&B in a child process; returns one line that says how it went.

    Never raises and never takes longer than `timeout` seconds, whatever W&B does. `out_dir` holds
    the `offline-run-*` folders: default `$WANDB_DIR/wandb`, or `./wandb`. Empty text: disabled.
    """
    follower = Follower.start(run_url, mode, project, entity, tags, out_dir, timeout, follow=False)
    return follower.finish(timeout)


class Follower:
    """A projection in a child process of its own session, so that Ctrl-C does not reach it."""

    def __init__(self, process: subprocess.Popen[str] | None, note: str, errors: str = "") -> None:
        self._process, self._note, self._errors = process, note, errors

    @staticmethod
    def start(
        run_url: str,
        mode: str = "auto",
        project: str = "stillhouse",
        entity: str | None = None,
        tags: Sequence[str] = (),
        out_dir: str | os.PathLike[str] | None = None,
        timeout: float = 120.0,
        *,
        follow: bool = True,
        attempt: int = 0,
    ) -> Follower:
        """Start projecting; with `follow` until the run's `run_end`, or until this process ends.

        `attempt` is the number of the attempt that is followed. Never raises.
        """
        try:
            mode = resolve(mode)
        except ValueError as error:
            return Follower(None, f"W&B: not tracked, {error}")
        if mode == "disabled":
            return Follower(None, "")
        command = [sys.executable, "-m", "jobs.tracking", str(run_url), "--mode", mode]
        command += ["--project", project, "--timeout", str(timeout), "--parent", str(os.getpid())]
        command += ["--out-dir", str(out_dir or default_folder())]
        command += ["--entity", entity] if entity else []
        command += [word for tag in tags for word in ("--tag", tag)]
        command += ["--follow", "--attempt", str(attempt)] if follow else []
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        try:
            handle, errors = tempfile.mkstemp(prefix="stillhouse-tracking-", suffix=".log")
            with os.fdopen(handle, "w") as log:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,  # closed by finish(): the job is over
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
        except OSError as error:
            return Follower(None, f"W&B: not tracked, its process did not start: {error}")
        return Follower(process, "", errors)

    def finish(self, timeout: float = 120.0) -> str:
        """Wait until it has caught up, at most `timeout` seconds, and return its one line."""
        if self._process is None:
            return self._note
        try:
            output, _ = self._process.communicate(timeout=timeout)
            lines = [line for line in output.splitlines() if line.strip()]
            note = lines[-1] if lines else f"W&B: not tracked ({self._why()})"
        except subprocess.TimeoutExpired:
            self._kill()
            note = f"W&B: given up after {timeout:g} s; the run itself is not affected"
        except (OSError, ValueError) as error:
            self._kill()
            note = f"W&B: not tracked ({error})"
        with contextlib.suppress(OSError):
            os.unlink(self._errors)
        self._process, self._note = None, note
        return note

    def _why(self) -> str:
        """The last line that the child said before it ended without a result."""
        try:
            lines = Path(self._errors).read_text(errors="replace").split("\n")
        except OSError:
            lines = []
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else "its process ended without a word"

    def _kill(self) -> None:
        """End the child and the service process that wandb started in its session."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired, OSError, ValueError):
            process.communicate(timeout=10)
