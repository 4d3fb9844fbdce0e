"""Checkpoints of a DeepSpeed engine on any storage, whole or not there.

    checkpoints/<name>/<step>-<attempt>/...          what the ranks saved
    checkpoints/<name>/<step>-<attempt>.json         written last: world size, stage, file hashes

Every rank saves into a temporary folder of its own and uploads what it wrote; a checkpoint exists
once its JSON does. DeepSpeed reads its files with pickle, so only files whose hashes the JSON holds
are loaded, from the run's own folder.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.storage import Store
from trainer.worker import Worker

_TAG = "state"


class CheckpointMisfit(ValueError):
    """A checkpoint that cannot be loaded as things are."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: where it is and what it says of itself."""

    folder: str
    step: int
    world: int
    zero_stage: int
    files: dict[str, str]
    state: dict[str, Any]


def find_latest(store: Store) -> Checkpoint | None:
    """The complete checkpoint of the highest step (then attempt) in `store`, if any."""
    names = [name for name in store.list("") if name.endswith(".json")]
    if not names:
        return None
    name = max(names)
    data = store.read_json(name)
    return Checkpoint(folder=name.removesuffix(".json"), **data)


def save(
    engine: Any, store: Store, worker: Worker, step: int, zero_stage: int, state: dict[str, Any]
) -> None:
    """Saves the engine after `step` steps, with a small JSON-able `state`; collective."""
    folder = f"{step:08d}-{worker.hooks.attempt:04d}"
    with tempfile.TemporaryDirectory(prefix="stillhouse-checkpoint-") as temporary:
        local = Path(temporary)
        (local / _TAG).mkdir()
        engine.save_checkpoint(str(local), tag=_TAG, save_latest=False)
        files = {
            str(path.relative_to(local)): hash_file(path)
            for path in sorted(local.rglob("*"))
            if path.is_file() and path.suffix == ".pt"
        }
        for path in sorted(local.rglob("*")):
            if path.is_file() and path.suffix != ".pt":  # DeepSpeed's own script for conversions
                path.unlink()
        worker.hooks.fence()
        store.upload_folder(local, folder)
    shares = worker.gather(files)
    if worker.is_main:
        worker.hooks.fence()
        record = {
            "step": step,
            "world": worker.world,
            "zero_stage": zero_stage,
            "files": {name: digest for share in shares for name, digest in share.items()},
            "state": state,
        }
        store.write_json(f"{folder}.json", record)
    worker.barrier()


def load(engine: Any, store: Store, checkpoint: Checkpoint, worker: Worker) -> None:
    """Puts the engine into the checkpoint's state; collective.

    Raises CheckpointMisfit for another world size or a file that is damaged.
    """
    if checkpoint.world != worker.world:
        raise CheckpointMisfit(
            f"{store.path(checkpoint.folder)}: the checkpoint was written by {checkpoint.world} "
            f"workers, this run has {worker.world}; set resources.distill.workers="
            f"{checkpoint.world}, or start over with --redo distill"
        )
    folder = store.fetch_folder(checkpoint.folder)
    for name, digest in checkpoint.files.items():
        if not (folder / name).is_file() or hash_file(folder / name) != digest:
            raise CheckpointMisfit(
                f"{store.path(checkpoint.folder, name)}: damaged or missing; delete "
                f"{store.path(checkpoint.folder)}.json to continue from the checkpoint before it"
            )
    path, _ = engine.load_checkpoint(str(folder), tag=_TAG)
    if path is None:
        raise CheckpointMisfit(f"{store.path(checkpoint.folder)}: DeepSpeed found nothing to load")


def prune(store: Store, keep: int) -> None:
    """Deletes all but the newest `keep` complete checkpoints, and what a kill left of others."""
    there = store.list("")
    complete = sorted(name for name in there if name.endswith(".json"))
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
