"""What a worker group lost, as Ray Train's controller hears of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def loss_callback(on_loss: Callable[[str, str], None]) -> Any:
    """A callback for Ray Train that calls on_loss(what, why); see `cluster.workers.Launch`."""
    from ray.train import UserCallback

    class Losses(UserCallback):
        """Runs in the controller's process."""

        def after_exception(
            self, run_context: Any, worker_exceptions: Mapping[int, BaseException]
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
