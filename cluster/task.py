"""What runs on the workers of the fan-out: a task's function, and the end of one that hangs."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.outcomes import of_exception
from cluster.progress import reporting


@dataclass(frozen=True)
class Start:
    """The first word of a task: where it runs, since when (seconds since the epoch).

    born: when its process was created. A pid alone may be another process's by now.
    """

    node: str  # Ray's id
    host: str
    pid: int
    born: float
    time: float


@dataclass(frozen=True)
class End:
    """The last word of a task: what its function returned, or a Failure, and when."""

    value: Any
    time: float


def perform(call: bytes, progress: str | None = None) -> Iterator[Start | End]:
    """Runs the pickled (function, arguments) of `call`; yields its Start, then its End.

    progress: where the driver reads how far it is (`cluster.progress`); the function is then
    called with a `report` more.

    What the function raises comes back as a Failure: an exception may be unknown to the driver, or
    not fit for pickling. It is unpickled after the Start is out, so that imports count as running.
    """
    import psutil
    import ray

    # Ray cancels by SIGINT, which a shell has what it starts in the background ignore, and so its
    # children, this process among them.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    pid = os.getpid()
    node = ray.get_runtime_context().get_node_id()
    born = psutil.Process(pid).create_time()
    yield Start(node, socket.gethostname(), pid, born, time.time())
    value: Any
    try:
        function, arguments = pickle.loads(call)
        with reporting(progress) as report:
            more = {} if progress is None else {"report": report}
            value = function(*arguments, **more)
    except (Exception, SystemExit) as error:  # not KeyboardInterrupt: so Ray cancels
        # Ray's own way out after SIGTERM, such as from its memory monitor or of a node that shuts
        # down: the process was taken away, the function has not ended.
        if hasattr(error, "ray_terminate_msg"):
            raise
        value = of_exception(error)
    yield End(value, time.time())


def end_process(pid: int, born: float, name: str) -> bool:
    """Kills a worker of this node, and its children, if it still is at the task of that name.

    SIGKILL also ends a process that is stopped or does not come back from C. pid, born: as in
    Start. Returns whether it was there.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        # Ray titles its workers by the task that they are at.
        titled = process.cmdline()[:1] == [f"ray::{name}"]
        if abs(process.create_time() - born) > 1 or not titled:
            return False
        children = process.children(recursive=True)
        process.kill()
    except psutil.NoSuchProcess:
        return False
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    return True
