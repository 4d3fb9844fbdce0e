"""Process groups for tests: N processes run one function, without Ray.

    results = spawn(train_all, jobs, world=2)      # train_all(jobs, rank, world) in each process

The function is top-level in a file that imports nothing heavy at its top; arguments and results
are pickled. Each process is set up as torchrun sets its own up, on the CPU, with one thread. It is
forked from one that has imported torch and DeepSpeed, which would take each of them seconds.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
# What nearly every rank imports, and nothing that starts a thread.
WARM = (
    "deepspeed",
    "trainer.worker",
    "trainer.loop",
    "transformers.models.llama.modeling_llama",
    "pytest",  # rank functions live in files of tests
)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set for a rank on one machine, and no accelerator."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }


class Process(Protocol):
    """One rank's process, as of `subprocess`."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class Forked:
    """A process that was forked from the warm one."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(str(self._process.pid), timeout or 0.0)
        return code

    def kill(self) -> None:
        """Ends it at once; does nothing where it has ended."""
        if self._process.exitcode is None:
            self._process.kill()


class Ranks:
    """Processes that run `function(*args)`, one per rank.

    fresh: each starts from nothing, for what is measured of a whole process, such as its memory.
    """

    def __init__(
        self, function: Callable[..., Any], *args: Any, world: int, fresh: bool = False
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="stillhouse-ranks-")
        folder = Path(self._folder.name)
        job = folder / "job"
        source = inspect.getsourcefile(function)
        job.write_bytes(pickle.dumps((source, function.__name__, args)))
        port = free_port()
        self._logs = [folder / f"log-{rank}" for rank in range(world)]
        self._results = [folder / f"result-{rank}" for rank in range(world)]
        begin = _start if fresh else _fork
        self.processes: list[Process] = [
            begin(job, self._results[rank], self._logs[rank], environment(rank, world, port))
            for rank in range(world)
        ]

    def results(self, timeout: float = 600) -> list[Any]:
        """Each rank's result; AssertionError, with the end of its output, for one that failed."""
        ends = time.monotonic() + timeout
        try:
            codes: list[int | None] = [
                process.wait(max(0.0, ends - time.monotonic())) for process in self.processes
            ]
        except subprocess.TimeoutExpired:
            codes = [process.poll() for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        if any(codes):
            logs = "\n".join(log.read_text(errors="replace")[-4000:] for log in self._logs)
            raise AssertionError(f"ranks ended with {codes}\n{logs}")
        return [pickle.loads(path.read_bytes()) for path in self._results]


def spawn(function: Callable[..., Any], *args: Any, world: int, fresh: bool = False) -> list[Any]:
    """`function(*args)` on `world` ranks; the results by rank."""
    return Ranks(function, *args, world=world, fresh=fresh).results()


class Log:
    """Hooks of a rank that remember what was emitted, and want a stop when asked so often."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self.stop_at = stop_at
        self.asked = 0

    def emit(self, event: str, **fields: Any) -> None:
        """Keeps the event."""
        self.events.append({"event": event, **fields})

    def wants_stop(self) -> bool:
        """True from the `stop_at`-th question on."""
        self.asked += 1
        return self.stop_at is not None and self.asked >= self.stop_at

    def hooks(self, attempt: int = 1) -> Any:
        """The hooks for a worker."""
        from trainer.worker import Hooks

        return Hooks(emit=self.emit, stop_requested=self.wants_stop, attempt=attempt)


@dataclass
class Told:
    """What one rank has to say of one training."""

    events: list[dict[str, Any]]
    metrics: dict[str, Any] | None = None
    error: str = ""
    logits: Any = None
    seconds: float = 0.0
    held_bytes: int = 0

    def losses(self) -> list[str]:
        """The losses of the steps, to the last bit."""
        return [event["loss"].hex() for event in self.events if event["event"] == "step"]

    def steps(self) -> list[int]:
        """Their numbers."""
        return [event["step"] for event in self.events if event["event"] == "step"]

    def values(self) -> list[float]:
        """The losses as numbers."""
        return [event["loss"] for event in self.events if event["event"] == "step"]

    def first(self, kind: str) -> dict[str, Any]:
        """The first event of a kind."""
        return next(event for event in self.events if event["event"] == kind)


def start() -> Any:
    """This process's worker, once in the life of the process."""
    from trainer.worker import Hooks, start_worker

    return start_worker(Hooks(), threads=1, uses_gpu=False, timeout_minutes=2)


def _start(job: Path, result: Path, log: Path, environ: Mapping[str, str]) -> Process:
    with log.open("wb") as out:
        command = [sys.executable, __file__, str(job), str(result)]
        return subprocess.Popen(command, env=environ, stdout=out, stderr=out, cwd=ROOT)


def _fork(job: Path, result: Path, log: Path, environ: Mapping[str, str]) -> Process:
    process = warm_up().Process(target=_as_rank, args=(job, result, log, dict(environ)))
    process.start()
    return Forked(process)


@functools.cache
def warm_up() -> ForkServerContext:
    """Starts the process that ranks are forked from, once in the life of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(WARM))
    with mock.patch.dict(os.environ, environment(0, 1, free_port())):  # the imports read it
        from multiprocessing import forkserver

        forkserver.ensure_running()
    return context


def _as_rank(job: Path, result: Path, log: Path, environ: Mapping[str, str]) -> None:
    """What a forked process does: becomes what one started with this environment would be."""
    # Of all that was imported nothing will be garbage. DeepSpeed collects that several times for
    # every engine, which took a quarter of the time of small trainings.
    gc.freeze()
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    with log.open("wb") as out:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(out.fileno(), stream.fileno())
    _work(job, result)


def _work(job: Path, result: Path) -> None:
    source, name, args = pickle.loads(job.read_bytes())
    spec = importlib.util.spec_from_file_location("rank_functions", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_functions"] = module
    spec.loader.exec_module(module)
    result.write_bytes(pickle.dumps(getattr(module, name)(*args)))


if __name__ == "__main__":
    _work(Path(sys.argv[1]), Path(sys.argv[2]))
