"""A trained student as a Hugging Face folder on storage, and whether it is there already."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster.storage import Store
from trainer.checkpoints import best, checkpoint
from trainer.checkpoints.best import BestWeights
from trainer.checkpoints.names import DONE
from trainer.corpus.corpus import Corpus
from trainer.corpus.tokenizer import load_tokenizer
from trainer.models import hash_files
from trainer.student.build import Built
from trainer.student.saving import save, student_state
from trainer.teacher.zero import forget
from trainer.training import Training
from trainer.worker import Worker


def read_done(job: Training) -> dict[str, Any] | None:
    """The metrics of this training, if it is done and the output still holds its weights."""
    if not job.checkpoints.exists(DONE) or not job.output.exists("config.json"):
        return None
    metrics = job.checkpoints.read_json(DONE)
    return metrics if metrics["weights"] == weights_hash(job.output.fetch_folder("")) else None


def weights_hash(folder: Path) -> str:
    """Hash of a model folder's weights."""
    return hash_files(sorted(folder.glob("*.safetensors")))


def publish(
    job: Training,
    built: Built,
    corpus: Corpus,
    worker: Worker,
    metrics: dict[str, Any],
    bests: BestWeights,
    patient: Any = None,
) -> None:
    """Saves the student to `job.output`, then says so; checkpoints go; collective.

    The student has the best weights. Where the last ones are others, they go to `job.last`.
    patient: a `Worker.patient_group`, in which the other ranks wait for rank 0's uploads.
    """
    state = student_state(built, worker.is_main)
    if worker.is_main:
        tokenizer = load_tokenizer(corpus.tokenizer_folder())
        chosen = bests.weights()
        if chosen is not None:
            _put(built, state, tokenizer, worker, job.last)
            state = chosen
        elif job.last.exists():
            worker.hooks.fence()
            job.last.delete("", recursive=True)
        metrics["weights"] = _put(built, state, tokenizer, worker, job.output)
        worker.hooks.flush()
        worker.hooks.fence()
        job.checkpoints.write_json(DONE, metrics)
        with suppress(OSError):  # the student is there; what is left over only takes up space
            checkpoint.prune(job.checkpoints, 0)
            if job.checkpoints.exists(best.FOLDER):
                job.checkpoints.delete(best.FOLDER, recursive=True)
    worker.wait(patient)
    module = built.engine.module
    built.engine.destroy()
    forget(module)


def _put(
    built: Built, state: dict[str, Tensor], tokenizer: Any, worker: Worker, store: Store
) -> str:
    """Makes `store` the student's folder with these weights; returns their hash."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-student-") as temporary:
        folder = Path(temporary)
        save(built, state, tokenizer, folder)
        worker.hooks.fence()
        new = {path.name for path in folder.iterdir()}
        for stale in sorted(set(store.list()) - new):
            store.delete(stale, recursive=True)
        store.upload_folder(folder, "")
        return weights_hash(folder)
