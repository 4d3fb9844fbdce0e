"""The weights of a training that did best on `select` so far.

    checkpoints/<name>/best/<step>-<attempt>-<token>/weights.safetensors    by parameter name
    checkpoints/<name>/best/<step>-<attempt>-<token>.json                   written last: its hash

They are kept in a local file, and uploaded with the first checkpoint that names them: a training
that was killed goes on from a checkpoint, and finds again what came after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cluster.storage import Fenced, Store
from trainer.training.checkpoint import (
    CheckpointFailed,
    CheckpointMisfit,
    Scratch,
    bring,
    hash_file,
)
from trainer.training.checkpoint_names import name_of, new_token, records
from trainer.worker import Worker

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FOLDER, FILE = "best", "weights.safetensors"


@dataclass(frozen=True)
class Best:
    """name: of its files. value: of the metric that chooses, less is better. metrics: what these
    weights reached on `select`."""

    name: str
    step: int
    value: float
    metrics: dict[str, float]


class BestWeights:
    """Keeps the best weights of a training; ranks other than 0 only know which they are.

    `checkpoints`: the training's folder. patient: a `Worker.patient_group`, in which ranks wait
    for the upload. Collective: making it, `offer`, `complete`, `restore`.
    """

    def __init__(
        self, checkpoints: Store, worker: Worker, patient: ProcessGroup | None = None
    ) -> None:
        self._checkpoints, self._worker = checkpoints, worker
        self._patient = patient
        self._token = worker.share(new_token() if worker.is_main else None)
        self._store = checkpoints.sub(FOLDER)
        self.best: Best | None = None
        self._local: Scratch | None = None  # of the best, on rank 0
        self._upload: _Upload | None = None
        self._uploaded = ""

    def offer(
        self,
        step: int,
        value: float,
        metrics: dict[str, float],
        gather: Callable[[], dict[str, Tensor]] | None,
    ) -> bool:
        """Keeps the weights after `step` steps if none were better; returns whether.

        gather: gives them on rank 0, called on all; None: they need not be kept.
        """
        if self.best is not None and value > self.best.value:
            return False
        name = name_of(step, self._worker.hooks.attempt, self._token)
        self.best = Best(name, step, value, metrics)
        self._drop_local()
        state = {} if gather is None else gather()
        if state and self._worker.is_main:
            from safetensors.torch import save_file

            self._local = Scratch()
            save_file(state, self._local.path / FILE)
        return True

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint: which weights are the best."""
        return None if self.best is None else asdict(self.best)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Goes on from the `state` of a checkpoint. Raises CheckpointMisfit without its weights."""
        if state is None:
            return
        self.best = Best(**state)
        self._uploaded = self.best.name
        name = f"{self.best.name}.json"
        there = self._worker.share(self._store.exists(name) if self._worker.is_main else None)
        if not there:
            raise CheckpointMisfit(
                f"{self._store.path(name)}: missing, of the best weights so far (step "
                f"{self.best.step}); start over with --redo distill"
            )

    def begin(self) -> None:
        """Starts the upload of the best weights, if they are not on storage yet."""
        if self._local is None or self.best is None or self.best.name == self._uploaded:
            return
        assert self._upload is None, "one upload at a time"
        self._upload = _Upload(self._store, self._worker, self.best.name, self._local)

    def done_here(self) -> bool:
        """Whether no upload is under way on this rank."""
        return self._upload is None or self._upload.done()

    def complete(self) -> None:
        """Waits for the upload under way, if there is one, and makes it count.

        Raises CheckpointFailed, or Fenced, on all ranks if it failed.
        """
        upload, self._upload = self._upload, None
        fenced, why, cause = False, "", None
        if upload is not None:
            try:
                upload.finish()
                self._uploaded = upload.name
            except Exception as error:
                fenced, why, cause = isinstance(error, Fenced), _line(error), error
            if upload.local is not self._local:
                upload.local.close()
        self._worker.wait(self._patient)
        fenced, why = self._worker.share((fenced, why))
        if fenced:
            raise Fenced(why) from cause
        if why:
            raise CheckpointFailed(
                f"{self._store.url}: the best weights were not saved: {why}"
            ) from cause

    def prune(self) -> None:
        """On rank 0: deletes those that no checkpoint names, and that are not the best."""
        there = self._store.list()
        if not there:
            return
        states = [
            self._checkpoints.read_json(name)["state"] for name in records(self._checkpoints.list())
        ]
        kept = {state["best"]["name"] for state in states if state.get("best")}
        if self.best is not None:
            kept.add(self.best.name)
        # First the JSON: without it the weights are none.
        for name in sorted(there, key=lambda name: not name.endswith(".json")):
            if name.removesuffix(".json") not in kept:
                self._store.delete(name, recursive=not name.endswith(".json"))

    def weights(self) -> dict[str, Tensor] | None:
        """On rank 0: the best weights by parameter name; None if they were not to be kept.

        Raises CheckpointMisfit if they are damaged.
        """
        from safetensors.torch import load_file

        if self._local is not None:
            return load_file(self._local.path / FILE)
        if self.best is None or self.best.name != self._uploaded:
            return None
        name = f"{self.best.name}/{FILE}"
        wanted = self._store.read_json(f"{self.best.name}.json")["hash"]
        with Scratch() as folder:
            path = folder / FILE
            if self._store.exists(name):
                bring(self._store, name, path)
            if not path.exists() or hash_file(path) != wanted:
                raise CheckpointMisfit(
                    f"{self._store.path(name)}: damaged or missing, the best weights of the "
                    f"training (step {self.best.step}); start over with --redo distill"
                )
            return load_file(path)

    def close(self) -> None:
        """Removes the local files."""
        if self._upload is not None:
            self._upload.local.close()
        self._upload = None
        self._drop_local()

    def _drop_local(self) -> None:
        # What is being uploaded goes afterwards.
        busy = self._upload is not None and self._upload.local is self._local
        if self._local is not None and not busy:
            self._local.close()
        self._local = None


class _Upload:
    """A file on its way to storage, in a thread."""

    def __init__(self, store: Store, worker: Worker, name: str, local: Scratch) -> None:
        self.name, self.local = name, local
        self._store, self._fence = store, worker.hooks.fence
        self._hash = ""
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="best-upload", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._hash = hash_file(self.local.path / FILE)
            self._fence()
            self._store.upload_folder(self.local.path, self.name)
        except Exception as error:  # handed to the training thread
            self._error = error

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Waits for it, and says on storage that it is whole. Raises what the upload raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._fence()
        self._store.write_json(f"{self.name}.json", {"hash": self._hash})


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
