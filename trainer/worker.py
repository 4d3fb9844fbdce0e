"""One rank of a distributed job: who it is, how ranks agree, where its events go, what memory it
held.

The same rank code runs under Ray Train and under torchrun; what differs is handed in as hooks.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainer.compiled_ops import dropping_stale_locks, ops_folder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _nothing(*_: Any, **__: Any) -> None:
    return None


@dataclass
class Hooks:
    """What the launcher gives its ranks.

    emit(event, **fields): records an event; called on rank 0 only. flush(): makes what was emitted
    visible before it returns. stop_requested(): whether the user asked for a clean stop.
    saves_requested(): how many checkpoints out of turn were asked for so far, such as before a node
    is taken away. fence(): raises if a newer attempt of the same run has taken over; called before
    anything is published. attempt: its number, for names.
    """

    emit: Callable[..., None] = _nothing
    flush: Callable[[], None] = _nothing
    stop_requested: Callable[[], bool] = lambda: False
    saves_requested: Callable[[], int] = lambda: 0
    fence: Callable[[], None] = _nothing
    attempt: int = 0


class NoGpu(ValueError):
    """A GPU was asked for and is not there."""


class Stopped(Exception):
    """The job was asked to stop and has saved its state."""


@dataclass
class Worker:
    """This process's rank in an initialised process group.

    group: the torch process group that `rank` and `world` are of; None = all ranks, or one rank by
    itself. timeout: how long ranks wait for each other at most.
    """

    rank: int
    world: int
    device: torch.device
    hooks: Hooks = field(default_factory=Hooks)
    group: Any = None
    timeout: datetime.timedelta | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def emit(self, event: str, **fields: Any) -> None:
        """Records an event, from rank 0; the other ranks stay silent."""
        if self.is_main:
            self.hooks.emit(event, **fields)

    def sum(
        self, values: Sequence[float] | torch.Tensor, group: ProcessGroup | None = None
    ) -> list[float]:
        """Sums of each value over all ranks, in float64, in the same order on every rank.

        values: a tensor [n] on this rank's device is waited for once, when all are summed.
        `group`: one of `patient_group`, instead of the ranks' own.
        """
        device = self.device if group is None else torch.device("cpu")
        tensor = torch.as_tensor(values, dtype=torch.float64).to(device, copy=True)
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group if group is None else group)
        return tensor.tolist()

    def patient_group(self) -> ProcessGroup | None:
        """A group for ranks that work apart and may wait a day for each other; collective."""
        if self.world == 1:
            return None
        return dist.new_group(
            None if self.group is None else dist.get_process_group_ranks(self.group),
            backend="gloo",
            timeout=datetime.timedelta(days=1),
            use_local_synchronization=self.group is not None,
        )

    def wait(self, patient: ProcessGroup | None) -> None:
        """Waits for all ranks as long as `patient`, a group of `patient_group`, does."""
        if self.world > 1:
            self.sum([0.0], group=patient)

    def share(self, value: object) -> Any:  # noqa: ANN401
        """Rank 0's `value`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group_src=0, group=self.group, device=self.device)
        return box[0]

    def stop_agreed(self) -> bool:
        """Whether a clean stop is asked for: rank 0's word, so that all stop in step; collective.

        A rank by itself asks itself, and waits for nobody.
        """
        return bool(self.share(self.is_main and self.hooks.stop_requested()))

    def gather(self, value: object) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            dist.barrier(group=self.group)

    @contextlib.contextmanager
    def limiting(self) -> Iterator[None]:
        """Process groups that are made in the block wait as long as the ranks' own, `timeout`.

        DeepSpeed makes groups of its own, with the 30 minutes (10 of NCCL) that torch gives those
        for which nothing is said.
        """
        if self.timeout is None or not dist.is_initialized():
            yield
            return
        from torch.distributed import distributed_c10d

        before = set(distributed_c10d._world.pg_map)
        with dropping_stale_locks():  # of ops that an engine loads, such as an optimizer's
            yield
        for group in set(distributed_c10d._world.pg_map) - before:
            if dist.get_rank(group) >= 0:
                distributed_c10d._set_pg_timeout(self.timeout, group)

    def nodes(self) -> list[list[int]]:
        """The ranks by the machine they run on, as the launcher named it; collective."""
        # Ray Train, torchrun, and what is left to go by under any other launcher.
        named = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK"))
        if named is None:
            named = str(self.rank // int(os.environ.get("LOCAL_WORLD_SIZE", self.world)))
        found: dict[str, list[int]] = {}
        for rank, node in enumerate(self.gather(named)):
            found.setdefault(node, []).append(rank)
        return list(found.values())

    def split(self, groups: Sequence[Sequence[int]]) -> Worker:
        """This rank within its one of `groups`, which hold every rank once; collective.

        Ranks of other groups neither take part in what a group shares nor wait for it. Of all
        groups' main ranks only the one of the whole still emits events.
        """
        assert self.group is None, "only the group of all ranks can be split"
        mine = next(list(ranks) for ranks in groups if self.rank in ranks)
        if len(mine) == self.world:
            return self
        made = None
        if any(len(ranks) > 1 for ranks in groups):  # also for a rank that will be alone
            made, _ = dist.new_subgroups_by_enumeration(
                [list(ranks) for ranks in groups], timeout=self.timeout
            )
        return replace(
            self,
            rank=mine.index(self.rank),
            world=len(mine),
            hooks=self.hooks if self.is_main else replace(self.hooks, emit=_nothing),
            group=made,
        )


def start_worker(hooks: Hooks, *, threads: int, uses_gpu: bool, timeout_minutes: float) -> Worker:
    """Joins the process group that RANK, WORLD_SIZE and LOCAL_RANK name; returns this rank.

    `threads`: torch threads of this process. A GPU that was asked for and is not there raises
    NoGpu: training on a CPU instead would be a silent, hundredfold slowdown.
    """
    torch.set_num_threads(threads)
    # DeepSpeed looks for ninja on the path when it loads its op; it is installed beside Python.
    folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
    if uses_gpu and not torch.cuda.is_available():
        raise NoGpu(
            "a GPU was asked for (resources.*.gpus_per_worker), but torch sees none in this "
            f"worker (torch {torch.__version__}); install a CUDA build of torch, or set it to 0"
        )
    if not uses_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    ops_folder()  # torch loads them from there
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if uses_gpu else torch.device("cpu")
    if uses_gpu:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if uses_gpu else "gloo", timeout=timeout)
    import deepspeed

    # DeepSpeed wraps the group that exists; it must neither look for MPI nor make its own.
    with dropping_stale_locks():
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
        )
    return Worker(dist.get_rank(), dist.get_world_size(), device, hooks, timeout=timeout)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a spec's `dtype`."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


class PeakMemory:
    """Memory of this process from here on.

    On a GPU the most that torch had allocated; on a CPU by how much the resident memory grew at the
    most, so what was imported before is not in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._before: int | None = None
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            return
        with contextlib.suppress(OSError):  # needs Linux; a container may refuse it
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): reset the high-water mark
            self._before = _resident("VmRSS")

    def bytes(self) -> int | None:
        """Bytes at the peak by now; None where the system does not tell."""
        if self._cuda is not None:
            return int(torch.cuda.max_memory_allocated(self._cuda))
        highest = _resident("VmHWM")
        if highest is None or self._before is None:
            return None
        return max(0, highest - self._before)

    def largest(self, worker: Worker) -> int | None:
        """Of all ranks the one that held most; collective."""
        found = [value for value in worker.gather(self.bytes()) if value is not None]
        return max(found, default=None)


def _resident(field: str) -> int | None:
    """A figure of /proc/self/status in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
