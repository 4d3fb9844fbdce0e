"""Checkpoints of a DeepSpeed engine on any storage, whole or not there.

    checkpoints/<name>/inputs.json                       what the training was made from
    checkpoints/<name>/<step>-<attempt>-<token>/...      what the ranks saved
    checkpoints/<name>/<step>-<attempt>-<token>.json     written last: world, stage, file hashes

The token is of one group of ranks: a group that is started again within an attempt, for a node was
lost, must not write where ranks of that node still do. Every rank saves into a temporary folder of
its own and uploads what it wrote (`saver`); a checkpoint exists once its JSON does. DeepSpeed reads
its files with pickle, so only files whose hashes the JSON holds are loaded, from the run's own
folder. Another number of ranks loads them through a universal checkpoint
(`load_universal`).

DeepSpeed's own converter takes the shards of all ranks apart into one folder per parameter, from
which every rank of another group reads its part (https://www.deepspeed.ai/tutorials/
universal-checkpointing). What its loader leaves wrong is set right here.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cluster.storage import Store
from trainer.training.checkpoint_names import records
from trainer.worker import Worker

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch.distributed import ProcessGroup


def convert_to_universal(saved: Path, target: Path) -> str | None:
    """Makes a universal checkpoint in `target` of one saved by ZeRO 1, 2 or 3 in `saved`.

    Returns why it failed, in one line, or None.
    """
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True)
    arguments = argparse.Namespace(
        input_folder=str(saved),
        output_folder=str(target),
        # In this process: one with threads and a device must not fork.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # Below stage 3 it asks for a note that only tensor parallelism makes.
        inject_missing_state=True,
    )
    talk = io.StringIO()
    try:
        with redirect_stdout(talk), redirect_stderr(talk):
            ds_to_universal.main(arguments)
    except Exception as error:  # it raises anything, assertions without a word too
        traceback.print_exc()
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"DeepSpeed could not convert it for another number of workers ({why})"
    return None


def load_universal(engine: DeepSpeedEngine, folder: str, tag: str) -> str | None:
    """Loads the universal checkpoint `folder/tag` into a fresh engine; collective.

    Frozen parameters keep the values they were built with. Returns why there was nothing to load,
    or None.
    """
    optimizer = engine.optimizer.optimizer
    ours = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in optimizer.param_groups
    ]
    config = engine._config  # read at loading alone, by `engine.load_universal_checkpoint()`
    config.load_universal_checkpoint = True
    try:
        path, _ = engine.load_checkpoint(folder, tag=tag)
    finally:
        config.load_universal_checkpoint = False
    if path is None:
        return "DeepSpeed found nothing to load in its universal checkpoint"
    # Under ZeRO-3 every group has been given the hyperparameters of the first.
    for group, values in zip(optimizer.param_groups, ours, strict=True):
        group.update(values)
    _own_steps(optimizer)
    return None


def _own_steps(optimizer: torch.optim.Optimizer) -> None:
    """Gives each state a step counter of its own, where the optimizer wants it.

    Under ZeRO-3 the loader hands one tensor to all, and each group's update would count it up.
    """
    on_device = any(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )
    for parameter, state in optimizer.state.items():
        step = state.get("step")
        if torch.is_tensor(step):
            state["step"] = step.clone().to(parameter.device if on_device else step.device)


_PREFIX = "stillhouse-state-"
# Younger ones may not be locked yet.
_YOUNG_S = 60.0


class Scratch:
    """A new folder below the system's temporary one (TMPDIR); `close` removes it.

    A killed process leaves its folder behind, and one with a checkpoint in it is large: whoever
    makes the next removes those whose lock nobody holds any more.
    """

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Removes it; a second time does nothing."""
        lock, self._lock = self._lock, -1  # first: another thread may close it as well
        if lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path, os.O_RDONLY)
        except OSError:  # removed by now, or another user's
            continue
        try:
            if time.time() - os.fstat(lock).st_mtime > _YOUNG_S:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # in use
            pass
        finally:
            os.close(lock)


# The folder in a checkpoint that DeepSpeed reads and writes.
TAG = "state"
# Files of one rank; what has no such name is read by all.
_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_")


class CheckpointMisfit(ValueError):
    """A checkpoint that cannot be loaded as things are."""


class CheckpointFailed(OSError):
    """A checkpoint that could not be saved."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: where it is and what it says of itself.

    folder: its name. step: steps that are done in it. world: ranks that wrote it. files: hash of
    each file, by path below the folder. state: what `Saver.begin` was given.
    """

    folder: str
    step: int
    world: int
    zero_stage: int
    files: dict[str, str]
    state: dict[str, Any]


def find_latest(store: Store) -> Checkpoint | None:
    """The complete checkpoint of the highest step (then attempt) in `store`, if any.

    Raises CheckpointMisfit, naming the file, if what it says of itself cannot be read.
    """
    names = records(store.list(""))
    if not names:
        return None
    name = names[-1]
    try:
        data = store.read_json(name)
        wanted = {field.name for field in fields(Checkpoint)} - {"folder"}
        if not isinstance(data, dict) or set(data) != wanted:
            raise ValueError(f"{store.path(name)}: must hold {', '.join(sorted(wanted))}")
    except ValueError as error:
        raise CheckpointMisfit(f"{error}; {_before(store, name)}") from error
    return Checkpoint(folder=name.removesuffix(".json"), **data)


def newest(store: Store, worker: Worker) -> Checkpoint | None:
    """What `find_latest` finds on rank 0, on every rank, or raised there; collective."""
    found, fault = None, None
    if worker.is_main:
        try:
            found = find_latest(store)
        except CheckpointMisfit as error:
            fault = str(error)
    found, fault = worker.share((found, fault))
    if fault is not None:
        raise CheckpointMisfit(fault)
    return found


def load(
    engine: DeepSpeedEngine,
    store: Store,
    checkpoint: Checkpoint,
    worker: Worker,
    patient: ProcessGroup | None = None,
) -> None:
    """Puts a fresh engine into the checkpoint's state, on any number of ranks; collective.

    patient: a `Worker.patient_group`, in which ranks wait for each other's downloads.
    Raises CheckpointMisfit, on all ranks, for a file that is missing or damaged, for another ZeRO
    stage, and for what DeepSpeed cannot load.
    """
    path = store.path(checkpoint.folder)
    stage = engine.zero_optimization_stage()
    if checkpoint.zero_stage != stage:
        raise CheckpointMisfit(
            f"{path}: was written with distill.zero_stage={checkpoint.zero_stage}, this run has "
            f"{stage}; set it back, or start over with --redo distill"
        )
    if checkpoint.world == worker.world:
        mine = [name for name in checkpoint.files if _rank_of(name) in (None, worker.rank)]
        with Scratch() as folder:
            fault = fetch(store, checkpoint, mine, folder)
            worker.wait(patient)
            _agree(worker, fault)
            loaded, _ = engine.load_checkpoint(
                str(folder),
                tag=TAG,
                load_module_strict=not has_frozen(engine.module),  # which were not saved
            )
        _agree(worker, None if loaded else f"{path}: DeepSpeed found nothing to load in it")
        return
    # One copy of the conversion per machine, made by its first rank.
    node = next(ranks for ranks in worker.nodes() if worker.rank in ranks)
    with Scratch() as folder:
        fault = None
        if worker.rank == node[0]:
            fault = fetch(store, checkpoint, checkpoint.files, folder / "saved")
            if fault is None:
                fault = convert_to_universal(folder / "saved" / TAG, folder / "universal" / TAG)
                fault = fault and f"{path}: {fault}; {ways_out(checkpoint)}"
        worker.wait(patient)  # a conversion may take longer than ranks wait otherwise
        _agree(worker, fault)
        converted = worker.gather(str(folder / "universal"))[node[0]]
        fault = load_universal(engine, converted, TAG)
        _agree(worker, fault and f"{path}: {fault}; {ways_out(checkpoint)}")  # before it is removed


def fetch(store: Store, checkpoint: Checkpoint, names: Iterable[str], target: Path) -> str | None:
    """Puts files of a checkpoint below `target`; a fault, one line, or None.

    As links where the storage is a local folder.
    """
    for name in names:
        place, fault = target / name, ""
        try:
            bring(store, f"{checkpoint.folder}/{name}", place)
        except FileNotFoundError:
            fault = "missing"
        else:
            if hash_file(place) != checkpoint.files[name]:
                place.unlink()  # nobody is to read it
                fault = "damaged: its hash differs"
        if fault:
            path = store.path(checkpoint.folder, name)
            return f"{path}: {fault}; {_before(store, f'{checkpoint.folder}.json')}"
    return None


def bring(store: Store, name: str, place: Path) -> None:
    """Puts an object at `place`: a link to it where it is local, else a download.

    Past the machine's cache of downloads, which only grows: a state is read once. Raises
    FileNotFoundError.
    """
    source = store.local(name)
    if source is not None and not source.is_file():
        raise FileNotFoundError(source)
    place.parent.mkdir(parents=True, exist_ok=True)
    if source is not None:
        place.symlink_to(source.absolute())
    else:
        store.download(name, place)


def has_frozen(module: torch.nn.Module) -> bool:
    """Whether some parameters are not trained."""
    return any(not parameter.requires_grad for parameter in module.parameters())


def ways_out(checkpoint: Checkpoint) -> str:
    """What a user can do where another number of workers cannot load a checkpoint."""
    return (
        f"it was written by {checkpoint.world} workers: set resources.distill.workers="
        f"{checkpoint.world}, or start over with --redo distill"
    )


def prune(store: Store, keep: int) -> None:
    """Deletes all but the newest `keep` complete checkpoints, and what a kill left of others."""
    there = store.list("")
    complete = records(there)
    kept = {name.removesuffix(".json") for name in (complete[-keep:] if keep else [])}
    for name in complete:  # first: without its JSON a checkpoint is none
        if name.removesuffix(".json") not in kept:
            store.delete(name)
    for name in there:
        if not name.endswith(".json") and name not in kept and name[:8].isdigit():
            store.delete(name, recursive=True)


def hash_file(path: Path) -> str:
    """blake2b-128 of a file's content, in hex."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _rank_of(name: str) -> int | None:
    """The rank that alone needs a file, at the number of ranks that wrote it."""
    found = _OF_RANK.search(name)
    return None if found is None else int(found[1])


def _before(store: Store, name: str) -> str:
    return f"delete {store.path(name)} to continue from the checkpoint before it"


def _agree(worker: Worker, fault: str | None) -> None:
    """Raises the first rank's fault on all ranks; collective."""
    for told in worker.gather(fault):
        if told is not None:
            raise CheckpointMisfit(told)
