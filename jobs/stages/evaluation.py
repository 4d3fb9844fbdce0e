"""What the sweep's tasks do on their machines: quantize, evaluate, measure. Run by Ray.

This is where the wings meet: the corpus and the teacher's records are `trainer`'s, the models'
quality is `quant`'s.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.storage import Attempt, Store
from quant.spec import QuantSpec, SweepSpec
from trainer.corpus.corpus import Batch, open_corpus
from trainer.logits.positions import read_along
from trainer.logits.reader import CacheReader
from trainer.models import find_model
from trainer.spec import TeacherSpec


@dataclass(frozen=True)
class Material:
    """What all tasks of one sweep share; picklable."""

    sweep: SweepSpec
    corpus: Store
    cache: Store | None
    attempt: Attempt
    vocab: int
    threads: int
    speed_threads: int
    gpus: float

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def batches(self) -> Iterator[Batch]:
        """The report part in batches of fixed size."""
        part = open_corpus(self.corpus).part("report")
        size = self.sweep.batch_sequences
        for start in range(0, len(part), size):
            yield part.batch(np.arange(start, min(start + size, len(part))))

    def records(self) -> Iterator[TeacherBatch] | None:
        """The teacher's records of the same batches, None without a teacher."""
        if self.cache is None:
            return None
        reader = CacheReader(self.cache, "eval")
        return (teacher_batch(reader, batch) for batch in self.batches())


@dataclass(frozen=True)
class TeacherBatch:
    """The teacher's records of a batch: [batch, seq, k] and [batch, seq]; tail is a probability."""

    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray
    entropy: np.ndarray
    true_logprob: np.ndarray


def teacher_batch(reader: CacheReader, batch: Batch) -> TeacherBatch:
    """The cached records of a batch, by sequence, where they count; the tail at temperature 1."""
    keys = [key.tobytes() for key in batch.keys]
    found = read_along(reader, keys, batch.loss_mask, reader.positions)
    assert found.entropy is not None and found.true_log_prob is not None  # the kind is eval
    shape = batch.input_ids.shape
    return TeacherBatch(
        found.ids.reshape(*shape, -1),
        found.log_probs.reshape(*shape, -1),
        np.exp(found.log_tails[:, 0]).reshape(shape),
        found.entropy.reshape(shape),
        found.true_log_prob.reshape(shape),
    )


def folder_of(model: Store | str, revision: str = "main") -> str:
    """A local folder of a model of the run, or of one by name."""
    if isinstance(model, Store):
        return str(model.fetch_folder(""))
    return str(find_model("student.model", model, revision))


def model_task(
    material: Material, role: str, name: str, model: Store | str, revision: str
) -> dict[str, Any]:
    """Evaluates an unquantized model and publishes evaluations/<role>.json."""
    from quant.cell import evaluate_model

    result = evaluate_model(
        folder_of(model, revision),
        material.batches(),
        material.records(),
        role,  # type: ignore[arg-type]
        name=name,
        threads=material.threads,
        device=material.device,
        vocab=material.vocab,
    )
    material.attempt.write_json(f"evaluations/{role}.json", result)
    return result


def teacher_task(material: Material, name: str, teacher: TeacherSpec) -> dict[str, Any]:
    """Evaluates the teacher from its records alone and publishes evaluations/teacher.json."""
    from quant.cell import evaluate_model

    result = evaluate_model(
        str(find_model("teacher.model", teacher.model, teacher.revision)),
        material.batches(),
        material.records(),
        "teacher",
        name=name,
        threads=material.threads,
    )
    material.attempt.write_json("evaluations/teacher.json", result)
    return result


def cell_task(
    material: Material, spec: QuantSpec, fingerprint: str, model: Store | str, revision: str
) -> dict[str, Any]:
    """One cell: quantizes, evaluates, publishes the model and then its result.json."""
    from quant.cell import run_cell
    from quant.tokenizer_files import copy_tokenizer

    source = Path(folder_of(model, revision))
    with tempfile.TemporaryDirectory(prefix="stillhouse-cell-") as temporary:
        result = run_cell(
            spec,
            str(source),
            material.batches(),
            material.records(),
            temporary,
            threads=material.threads,
            device=material.device,
            vocab=material.vocab,
            keep_16bit=material.sweep.keep_16bit,
        )
        copy_tokenizer(source, Path(temporary))
        _publish(material.attempt, Path(temporary), f"cells/{spec.key}/model")
    result["fingerprint"] = fingerprint
    material.attempt.write_json(f"cells/{spec.key}/result.json", result)
    return result


def _publish(attempt: Attempt, folder: Path, place: str) -> None:
    """Uploads a model. What an earlier version had left there under other names goes: programs
    that look for those names would take it for the model."""
    attempt.upload_folder(folder, place)
    for name in attempt.store.sizes(place).keys() - {path.name for path in folder.iterdir()}:
        attempt.store.delete(f"{place}/{name}")


def speed_task(
    material: Material, spec: QuantSpec, model: Store | str, revision: str
) -> dict[str, Any]:
    """The speed of a finished cell beside the 16-bit model; adds it to the cell's result.json."""
    from quant.cell import measure_cell

    store = material.attempt.store
    speeds = measure_cell(
        str(store.fetch_folder(f"cells/{spec.key}/model")),
        folder_of(model, revision),
        material.sweep.speed_prompt_tokens,
        material.sweep.speed_decode_tokens,
        threads=material.speed_threads,
        device=material.device,
    )
    path = f"cells/{spec.key}/result.json"
    material.attempt.write_json(path, {**store.read_json(path), **speeds})
    return speeds
