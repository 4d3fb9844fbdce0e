"""How tasks and worker groups fail: one line each, of which kind, and when the work ran."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluster.storage.store import format_bytes

Kind = Literal["error", "lost", "memory", "time", "resources", "dependency"]

# By name: this floor imports neither torch nor pyarrow.
_MEMORY_CLASSES = ("MemoryError", "OutOfMemoryError")
_MEMORY_TEXTS = (
    "can't allocate memory",  # torch on a CPU
    "out of memory",  # CUDA's own errors
    "cannot allocate memory",
    "alloc_failed",  # cuBLAS, cuDNN
)


# A task that takes less of its node's memory is not why there is none left.
_LITTLE = 0.05


@dataclass(frozen=True)
class Failure:
    """A task that failed: one line for the user, the traceback, and what it was.

    kind: "error" the function raised; "lost" its workers or nodes died; "memory" there was not
    enough; "time" it was ended at its limit; "resources" no node can hold it; "dependency" it was
    not started because another one failed.
    """

    error: str
    detail: str
    kind: Kind = "error"


@dataclass(frozen=True)
class Timing:
    """When a task ran, in seconds since the epoch.

    submitted: first handed to Ray, by the driver's clock; None if it never was. started, ended: of
    its last attempt, by the clock of its node; `ended` of a task that did not end by itself is when
    the driver learnt of it. node, pid: where that was.
    """

    submitted: float | None
    started: float | None
    ended: float
    node: str | None
    pid: int | None
    attempts: int


def one_line(text: str, limit: int = 500) -> str:
    """The text with all white space as single blanks, cut to `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def of_exception(error: BaseException) -> Failure:
    """What a function raised: "error", or "memory" where it could not have what it asked for."""
    text = str(error)
    name = type(error).__name__
    detail = "".join(traceback.format_exception(error))
    kind: Kind = "memory" if _is_memory(error) else "error"
    return Failure(one_line(f"{name}: {text}" if text.strip() else name), detail, kind)


def _is_memory(error: BaseException | None) -> bool:
    while error is not None:
        if any(base.__name__ in _MEMORY_CLASSES for base in type(error).__mro__):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(part in text for part in _MEMORY_TEXTS):
            return True
        error = error.__cause__
    return False


def of_ray(error: Exception, pid: int | None, claim: int = 0) -> tuple[Failure, bool]:
    """What Ray says of a task that did not answer, and whether a new attempt can mend it.

    pid: the process that ran it, None if it is not known. claim: bytes that it was said to need, 0
    for not known. A lost worker, node or object can be mended. What Ray's memory monitor killed can
    not, unless others are to blame: since version 2.56 Ray kills the newest tasks of a node until
    there is memory enough, whatever they use.
    """
    from ray import exceptions

    text = str(error)
    if isinstance(error, exceptions.OutOfMemoryError):
        line, blameless = _killed_for_memory(text, pid, claim)
        return Failure(one_line(line), text, "memory"), blameless
    if isinstance(error, exceptions.RayTaskError):
        # Around the function: a result that cannot be pickled.
        cause = error.cause if isinstance(error.cause, Exception) else error
        return Failure(of_exception(cause).error, text, of_exception(cause).kind), False
    name = type(error).__name__
    if isinstance(error, exceptions.ObjectStoreFullError):
        return Failure(one_line(f"{name}: {text}"), text, "memory"), False
    lost = (
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
        exceptions.LocalRayletDiedError,
    )
    if isinstance(error, lost):
        return Failure(one_line(f"{name}: {text}"), text, "lost"), True
    return Failure(one_line(f"{name}: {text}"), text, "error"), False


def _killed_for_memory(text: str, pid: int | None, claim: int) -> tuple[str, bool]:
    """The one line on a kill by Ray's memory monitor, and whether others are to blame.

    They are if another task of the node took more, or if this one kept to its claim or to little.
    """
    # Ray says GB for 2^30 bytes.
    node = re.search(r"was ([\d.]+)GB used / ([\d.]+)GB limit", text)
    found = re.findall(r"pid=(\d+), actual memory used=([\d.]+)GB", text)
    used = {int(process): float(amount) * 2**30 for process, amount in found}
    if node is None or pid not in used:
        return f"killed by Ray because its node ran out of memory: {text}", False
    there, limit = (float(amount) * 2**30 for amount in node.groups())
    line = (
        f"killed by Ray because its node ran out of memory ({format_bytes(there)} of "
        f"{format_bytes(limit)} in use); it used {format_bytes(used[pid])}"
    )
    most = max(used.values())
    if most > used[pid]:
        return f"{line}, another task {format_bytes(most)}", True
    if used[pid] <= claim:
        return f"{line} and was to have {format_bytes(claim)}", True
    return line, used[pid] < _LITTLE * limit


def where(start: Any) -> str:  # noqa: ANN401
    """A process of the cluster, for people."""
    return f"{start.host} (node {start.node[:8]}, pid {start.pid})"


def failure_callback(on_loss: Callable[[str, str], None]) -> Any:  # noqa: ANN401
    """A callback for Ray Train that calls on_loss(what, why); see `cluster.workers.Launch`."""
    from ray.train import UserCallback

    class Losses(UserCallback):
        """Runs in the controller's process."""

        def after_exception(
            self,
            run_context: Any,  # noqa: ANN401
            worker_exceptions: Mapping[int, BaseException],  # noqa: ANN401
        ) -> None:
            on_loss(*in_words(worker_exceptions))

    return Losses()


def in_words(errors: Mapping[int, BaseException]) -> tuple[str, str]:
    """What was lost ("a lost node", "a lost worker", "an error"), and why, in one line.

    errors: by rank. Where a node is gone, the errors of the other ranks only follow from that.
    """
    lost = {
        rank: error
        for rank, error in errors.items()
        if type(error).__name__ in ("WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError")
    }
    texts = {rank: f"{error} {error.__cause__ or ''}" for rank, error in lost.items()}
    gone = [rank for rank, text in texts.items() if "node has died" in text]
    if gone:
        what, rank = "a lost node", min(gone)
    elif lost:
        what, rank = "a lost worker", min(lost)
    else:
        what, rank = "an error", min(errors)
    others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    why = " ".join(str(errors[rank]).split())[:400]
    return what, f"rank {rank}{others}: {why}"
