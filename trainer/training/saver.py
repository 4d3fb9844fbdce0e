"""Saving checkpoints while training goes on.

The training is held only while DeepSpeed writes its files to a local folder. A thread then hashes
and uploads them; once every rank's have arrived, rank 0 writes the JSON that makes them a
checkpoint. A kill before that leaves the checkpoint before it as the newest.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.storage import Fenced, Store
from trainer.training.checkpoint import TAG, CheckpointFailed, Scratch, has_frozen, hash_file, prune
from trainer.training.checkpoint_names import name_of, new_token
from trainer.worker import Worker

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was completed.

    step: steps that are done in it. held_s: seconds for which the training stood still for it;
    upload_s: seconds from there until this rank's files had arrived. bytes: of all ranks' files.
    """

    step: int
    held_s: float
    upload_s: float
    bytes: int


class _Upload:
    """One rank's files of one checkpoint on their way, in a thread."""

    def __init__(self, store: Store, worker: Worker, folder: str, local: Scratch) -> None:
        self._store, self._fence = store, worker.hooks.fence
        self._folder, self._local = folder, local
        self._began = time.monotonic()
        self.files: dict[str, str] = {}
        self.bytes = 0
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="checkpoint-upload", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            local = self._local.path
            for path in sorted(local.rglob("*")):
                if path.is_file() and path.suffix != ".pt":
                    path.unlink()  # DeepSpeed's own script for conversions
                elif path.is_file():
                    self.files[path.relative_to(local).as_posix()] = hash_file(path)
                    self.bytes += path.stat().st_size
            self._fence()
            self._store.upload_folder(local, self._folder)
        except BaseException as error:  # handed to the training thread
            self.error = error
        finally:
            self.drop()
            self.seconds = time.monotonic() - self._began

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Returns after its end."""
        self._thread.join()

    def drop(self) -> None:
        """Removes the local files; an upload under way ends at the next of them."""
        self._local.close()


class Saver:
    """Saves a training's checkpoints to `store`, one at a time, `keep` of them kept.

    patient: a `Worker.patient_group`, in which ranks wait for each other's uploads. Collective:
    making it, `begin` and `complete`.
    """

    def __init__(
        self, store: Store, worker: Worker, keep: int, patient: ProcessGroup | None = None
    ) -> None:
        self._store, self._worker, self._keep = store, worker, keep
        self._patient = patient
        self._token = worker.share(new_token() if worker.is_main else None)
        self._upload: _Upload | None = None
        self._folder = ""
        self._record: dict[str, Any] = {}
        self._held = 0.0

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is under way."""
        return self._upload is not None

    def begin(
        self, engine: DeepSpeedEngine, step: int, zero_stage: int, state: dict[str, Any]
    ) -> None:
        """Writes the engine's state after `step` steps to local files and starts their upload.

        state: small and JSON-able; comes back as `Checkpoint.state`. Raises RuntimeError while
        another checkpoint is under way.
        """
        if self.busy:
            raise RuntimeError("a checkpoint is under way; complete() it first")
        began = time.monotonic()
        worker = self._worker
        self._folder = name_of(step, worker.hooks.attempt, self._token)
        self._record = {
            "step": step, "world": worker.world, "zero_stage": zero_stage, "state": state
        }  # fmt: skip
        local = Scratch()
        try:
            (local.path / TAG).mkdir()
            engine.save_checkpoint(
                str(local.path),
                tag=TAG,
                save_latest=False,
                # They are as they were built: of a student with adapters almost all.
                exclude_frozen_parameters=has_frozen(engine.module),
            )
        except BaseException:
            local.close()
            raise
        self._upload = _Upload(self._store, worker, self._folder, local)
        self._held = time.monotonic() - began

    def done_here(self) -> bool:
        """Whether this rank's upload has ended, well or not; False when none is under way."""
        return self._upload is not None and self._upload.done()

    def complete(self) -> Saved:
        """Makes what was uploaded a checkpoint, and deletes old ones; waits for ranks not done.

        Raises CheckpointFailed, or Fenced, on all ranks if one of them failed.
        """
        began = time.monotonic()
        upload, worker = self._upload, self._worker
        assert upload is not None, "no checkpoint is under way"
        upload.wait()
        worker.wait(self._patient)  # an upload may take longer than ranks wait otherwise
        self._upload = None
        shares = worker.gather((upload.files, upload.bytes, _describe(upload.error)))
        for rank, (_, _, fault) in enumerate(shares):
            if fault is not None:
                self._raise(f"rank {rank} could not upload its files", fault, upload.error)
        failed: BaseException | None = None
        if worker.is_main:
            try:
                worker.hooks.fence()
                files = {name: digest for share, *_ in shares for name, digest in share.items()}
                self._store.write_json(f"{self._folder}.json", {**self._record, "files": files})
                with suppress(OSError):  # what is left over goes with the next one
                    prune(self._store, self._keep)
            except Exception as error:
                failed = error
        fault = worker.share(_describe(failed))
        if fault is not None:
            self._raise("rank 0 could not complete it", fault, failed)
        held = self._held + time.monotonic() - began
        size = sum(share for _, share, _ in shares)
        return Saved(self._record["step"], held, upload.seconds, size)

    def _raise(self, what: str, fault: tuple[bool, str], cause: BaseException | None) -> None:
        fenced, why = fault
        if fenced:
            raise Fenced(why) from cause
        path = self._store.path(self._folder)
        raise CheckpointFailed(f"{path}: the checkpoint was not saved: {what}: {why}") from cause

    def close(self) -> None:
        """Gives up what is under way, on this rank alone; its local files are removed."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.drop()


def _describe(error: BaseException | None) -> tuple[bool, str] | None:
    """An error that can travel between ranks: whether it is a fence, and its text."""
    if error is None:
        return None
    text = " ".join(str(error).split())[:400]
    return isinstance(error, Fenced), f"{type(error).__name__}: {text}"
