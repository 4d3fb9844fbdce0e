"""A group of distributed workers: Ray Train V2 starts them, watches them, replaces lost ones."""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from cluster.capacity import Group
from cluster.failures import failure_callback
from cluster.kv import Handover


def is_pending(group: Group) -> bool:
    """Whether workers like those of `group` wait to be placed, on the cluster joined."""
    from ray.util import placement_group_table

    shape = {"CPU": float(group.cpus), **({"GPU": float(group.gpus)} if group.gpus else {})}
    for each in placement_group_table().values():
        waits = each["state"] in ("PENDING", "RESCHEDULING")
        bundles = [dict(bundle) for bundle in each["bundles"].values()]
        if waits and any(bundle == shape for bundle in bundles):
            return True
    return False


class Launch:
    """A worker group at work, in the background of this process."""

    def __init__(
        self,
        function: Callable[[dict[str, Any]], None],
        config: dict[str, Any],
        group: Group,
        name: str,
        max_failures: int,
        *,
        collective_minutes: float,
        on_loss: Callable[[str, str], None],
        stays: bool = False,
    ) -> None:
        """Starts `function(config)` on every worker, with torch.distributed set up.

        A lost worker restarts the whole group, at most `max_failures` times, and not counting nodes
        that were taken away with notice; an elastic group
        then has as many workers as there is room for, and is restarted when there is room for more.
        The function has to find its way back by itself. `name` is for Ray's own files.
        collective_minutes: how long ranks wait for each other. on_loss(what, why): called in
        another process, so it must pickle, when the group has lost workers; what: "a lost node",
        "a lost worker" or "an error", why: one line. stays: `config["more"]` is a `Handover` from
        which the function takes what `hand` gives it, until that is None; else it is None.
        """
        self._more = Handover() if stays else None
        self._handed = 0
        config = {**config, "more": self._more}
        self._error: BaseException | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="stillhouse-ray-train-")
        self._thread = threading.Thread(
            target=self._fit,
            args=(function, config, group, name, max_failures, collective_minutes, on_loss),
            daemon=True,
        )
        self._thread.start()

    def _fit(
        self,
        function: Callable[[dict[str, Any]], None],
        config: dict[str, Any],
        group: Group,
        name: str,
        max_failures: int,
        collective_minutes: float,
        on_loss: Callable[[str, str], None],
    ) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        # Typed as the older interface has it, which knows no range.
        count: Any = group.workers
        if group.fewest is not None:
            count = (group.fewest, group.workers)
        try:
            TorchTrainer(
                function,
                train_loop_config=config,
                scaling_config=ScalingConfig(
                    num_workers=count,
                    use_gpu=group.gpus > 0,
                    resources_per_worker={"CPU": group.cpus, "GPU": group.gpus}
                    if group.gpus
                    else {"CPU": group.cpus},
                ),
                torch_config=TorchConfig(
                    backend="nccl" if group.gpus else "gloo",
                    timeout_s=math.ceil(collective_minutes * 60),
                ),
                run_config=RunConfig(
                    name=name,
                    # Ray Train's own book-keeping; the state of the job is on the run's storage.
                    storage_path=self._scratch.name,
                    failure_config=FailureConfig(max_failures=max_failures),
                    callbacks=[failure_callback(on_loss)],
                ),
            ).fit()
        except BaseException as error:  # handed to the waiting thread
            self._error = error

    def hand(self, work: object) -> None:
        """Gives a group that stays its next piece of work; None: it is to end."""
        assert self._more is not None
        self._handed += 1
        self._more.put(self._handed, work)

    def wait(self, seconds: float) -> bool:
        """Waits at most so long; returns whether the group has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def error(self) -> BaseException | None:
        """Why the group failed, None if it ended well; call it after the end."""
        if self._more is not None:
            self._more.clear()
        self._scratch.cleanup()
        return self._error
