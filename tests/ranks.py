"""Process groups for tests: N processes run one function, without Ray.

    results = spawn(train_all, jobs, world=2)      # train_all(jobs, rank, world) in each process

The function is top-level in a file that imports nothing heavy at its top; arguments and results
are pickled. Each process is set up as torchrun sets its own up, on the CPU, with one thread.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


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


class Ranks:
    """Processes that run `function(*args)`, one per rank."""

    def __init__(self, function: Callable[..., Any], *args: Any, world: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="stillhouse-ranks-")
        folder = Path(self._folder.name)
        job = folder / "job"
        source = inspect.getsourcefile(function)
        job.write_bytes(pickle.dumps((source, function.__name__, args)))
        port = free_port()
        self._logs = [folder / f"log-{rank}" for rank in range(world)]
        self._results = [folder / f"result-{rank}" for rank in range(world)]
        self.processes = []
        for rank in range(world):
            with self._logs[rank].open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, str(job), str(self._results[rank])],
                        env=environment(rank, world, port),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                    )
                )

    def results(self, timeout: float = 150) -> list[Any]:
        """Each rank's result; AssertionError, with the end of its output, for one that failed."""
        try:
            codes = [process.wait(timeout) for process in self.processes]
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


def spawn(function: Callable[..., Any], *args: Any, world: int) -> list[Any]:
    """`function(*args)` on `world` ranks; the results by rank."""
    return Ranks(function, *args, world=world).results()


class Log:
    """Hooks of a rank that remember what was emitted, and ask for a stop after some steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self.stop_after = stop_after

    def emit(self, event: str, **fields: Any) -> None:
        """Keeps the event."""
        self.events.append({"event": event, **fields})

    def of(self, event: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [item for item in self.events if item["event"] == event]

    def wants_stop(self) -> bool:
        """Whether as many steps were seen as there are to be."""
        return self.stop_after is not None and len(self.of("step")) >= self.stop_after

    def hooks(self, attempt: int = 1) -> Any:
        """The hooks for a worker."""
        from trainer.worker import Hooks

        return Hooks(emit=self.emit, stop_requested=self.wants_stop, attempt=attempt)


def start() -> Any:
    """This process's worker, once in the life of the process."""
    from trainer.worker import Hooks, start_worker

    return start_worker(Hooks(), threads=1, uses_gpu=False, timeout_minutes=2)


def _main() -> None:
    job, result = map(Path, sys.argv[1:])
    source, name, args = pickle.loads(job.read_bytes())
    spec = importlib.util.spec_from_file_location("rank_functions", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_functions"] = module
    spec.loader.exec_module(module)
    result.write_bytes(pickle.dumps(getattr(module, name)(*args)))


if __name__ == "__main__":
    _main()
