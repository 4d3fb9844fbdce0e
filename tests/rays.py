"""A real Ray cluster of several nodes, as processes of this machine, with its dashboard."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.ranks import free_port

RAY = str(Path(sys.executable).with_name("ray"))
# Of several nodes of one machine each takes ports that are free.
PORTS = ("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0")
# Small and quick: a lost node is noticed within seconds, and no memory is held back for objects.
SETTINGS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Node:
    """One node: the process that `ray start --block` is, and all that it has started."""

    process: subprocess.Popen[bytes]
    temp: Path

    def processes(self) -> list[psutil.Process]:
        """The node's processes, workers included."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def holds(self, pid: int) -> bool:
        """Whether a process is one of this node's."""
        return any(process.pid == pid for process in self.processes())

    def kill(self) -> None:
        """Ends the node as a machine ends that loses its power; one that has ended stays so."""
        if self.process.poll() is not None:
            return
        mine = self.processes()
        for process in (psutil.Process(self.process.pid), *mine):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        psutil.wait_procs(mine, timeout=10)

    def logs(self) -> Path:
        """Where Ray and its workers write."""
        return self.temp / "session_latest" / "logs"


@dataclass
class Rays:
    """A head, whose dashboard is at `address`, and other nodes."""

    folder: Path
    env: dict[str, str]
    port: int
    dashboard: int
    head: Node
    others: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def gcs(self) -> str:
        from ray.util import get_node_ip_address

        # Nodes of 127.0.0.1 do not find each other.
        return f"{get_node_ip_address()}:{self.port}"

    def add(self, *options: str, prefix: Sequence[str] = ()) -> Node:
        """Starts another node; `prefix`: a command to start it by, such as unshare."""
        command = [*prefix, RAY, "start", "--address", self.gcs, "--block", *PORTS, *options]
        self.others.append(
            start_node(command, self.env, self.folder / f"node-{len(self.others)}.log")
        )
        return self.others[-1]

    def node_of(self, pid: int) -> Node:
        """The node on which a process runs."""
        return next(node for node in (self.head, *self.others) if node.holds(pid))

    def wait_for(self, count: int, seconds: float = 90) -> None:
        """Returns when so many nodes are alive."""
        from cluster.rayjobs import RayJobs

        ends = time.monotonic() + seconds
        while True:
            try:
                if len(RayJobs(self.address).nodes()) == count:
                    return
            except Exception:
                if time.monotonic() > ends:
                    raise
            assert time.monotonic() < ends, f"not {count} nodes after {seconds} s"
            time.sleep(0.5)

    def end(self) -> None:
        for node in (*self.others, self.head):
            node.kill()
            shutil.rmtree(node.temp, ignore_errors=True)


def start(folder: Path, *, cpus: int = 1, options: Sequence[str] = (), **more: Any) -> Rays:
    """A head alone. options: of its `ray start`; more: variables of all nodes' environment."""
    port, dashboard = more.pop("port", None) or free_port(), more.pop("dashboard", None)
    dashboard = dashboard or free_port()
    _need_token()
    env = {**os.environ, **SETTINGS, "RAY_AUTH_MODE": "token", **more}
    env.pop("RAY_ADDRESS", None)
    # The driver of a job is started by name.
    env["PATH"] = os.pathsep.join([str(Path(RAY).parent), env["PATH"]])
    command = [RAY, "start", "--head", "--block", "--port", str(port), "--num-cpus", str(cpus)]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    command += ["--ray-client-server-port", str(free_port()), *PORTS, *options]
    return Rays(folder, env, port, dashboard, start_node(command, env, folder / "head.log"))


def _need_token() -> None:
    """Only who has this user's token is let in; Ray makes it where there is none.

    No other one: Ray reads it once in the life of a process, so one that has had a cluster of its
    own (`ray.init`) could not speak to these, nor the other way round.
    """
    if "RAY_AUTH_TOKEN" in os.environ:
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if not path.exists():
        command = [RAY, "get-auth-token", "--generate"]
        subprocess.run(command, capture_output=True, check=True)


def start_node(command: list[str], env: dict[str, str], log: Path) -> Node:
    """Runs a `ray start --block` as a node with a folder of its own; what it says goes to `log`."""
    # As on machines of their own: nodes that shared it would unpack the checkout over each other's.
    temp = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # the names of sockets must be short
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*command, "--temp-dir", str(temp)],
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Node(process, temp)


@contextmanager
def cluster(folder: Path, nodes: int = 3, *, cpus: int = 1, **more: Any) -> Iterator[Rays]:
    """A head with so many other nodes of one CPU each."""
    rays = start(folder, cpus=cpus, **more)
    try:
        rays.wait_for(1)
        for number in range(nodes):
            rays.add("--num-cpus", "1")
            rays.wait_for(number + 2)  # at the same time they would take the same socket
        yield rays
    finally:
        rays.end()
