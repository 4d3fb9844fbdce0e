"""What all tasks of one sweep share: corpus, records, references, the 16-bit models. Picklable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.kv import Report, silent
from cluster.storage import Attempt, Store
from jobs.run.context import Context
from jobs.sweep.fingerprints import reference_folder
from jobs.sweep.progress import Advance
from quant.spec import SweepSpec
from trainer.corpus.corpus import Batch, open_corpus
from trainer.logits.records import Records
from trainer.models.load import find_model
from trainer.spec.sections import CacheSpec, DataSpec, DistillSpec

if TYPE_CHECKING:
    from quant.evaluation.measure import EvaluationConfig, EvaluationData
    from trainer.logits.reader import CacheReader

PARTS = ("select", "report")


@dataclass(frozen=True)
class Source:
    """A 16-bit model that cells are made of.

    role: student or teacher. model: a folder of the run, or a name with its revision. name: how
    tables call it. identity: what it is, for fingerprints. references: the folder of the run with
    its stored references.
    """

    role: str
    model: Store | str
    revision: str
    name: str
    identity: Any
    references: str

    def folder(self) -> str:
        """A local folder of the model; on a machine it is fetched once."""
        if isinstance(self.model, Store):
            return str(self.model.fetch_folder(""))
        return str(find_model(f"{self.role}.model", self.model, self.revision))

    def config_folder(self) -> Path:
        """A local folder with the model's config, which may lack its weights."""
        if isinstance(self.model, Store):
            return self.model.fetch("config.json").parent
        key = f"{self.role}.model"
        return find_model(key, self.model, self.revision, weights=False)


@dataclass(frozen=True)
class SharedContext:
    """What all tasks of one sweep share.

    vocab: ids that exist. threads, speed_threads: of torch, for evaluations and for speeds. gpus:
    of a task. distill, cache_spec, data, seed: of the training, for recovery. report: of the
    task that has it (`jobs.sweep.tasks.call`).
    """

    sweep: SweepSpec
    corpus: Store
    cache: Store | None
    attempt: Attempt
    vocab: int
    threads: int
    speed_threads: int
    gpus: float
    seed: int = 0
    data: DataSpec | None = None
    distill: DistillSpec | None = None
    cache_spec: CacheSpec | None = None
    report: Report = silent

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def batches(self, part: str = "report") -> Iterator[Batch]:
        """A part in batches of fixed size."""
        found = open_corpus(self.corpus).part(part)
        size = self.sweep.batch_sequences
        for start in range(0, len(found), size):
            yield found.batch(np.arange(start, min(start + size, len(found))))

    def records(self, part: str = "report") -> Iterator[Records]:
        """The teacher's records of the same batches. Raises ValueError without a teacher."""
        if self.cache is None:
            raise ValueError("there are no records: the spec has no teacher")
        from trainer.logits.reader import CacheReader

        reader = CacheReader(self.cache, "eval")
        return (teacher_records(reader, batch) for batch in self.batches(part))

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return int(open_corpus(self.corpus).manifest["sequence_length"])

    def sequences(self, part: str) -> int:
        """How many a part has."""
        return len(open_corpus(self.corpus).part(part))

    def part(
        self, name: str, source: Source | None = None, advance: Advance | None = None
    ) -> EvaluationData:
        """What models are evaluated on; with the stored reference of `source` if one is given.

        advance: hears how far passes over it are.
        """
        from functools import partial

        from quant.evaluation.measure import EvaluationData

        reference = None
        if source is not None:
            reference = str(self.attempt.store.fetch_folder(f"{source.references}/{name}"))
        records = None if self.cache is None else partial(self.records, name)
        progress = None if advance is None else advance.part(name, self.sequences(name))
        return EvaluationData(partial(self.batches, name), records, reference, progress)

    def evaluation_config(self, advance: Advance | None = None) -> EvaluationConfig:
        """How models are evaluated. advance: hears how far benchmark tasks are."""
        from quant.evaluation.measure import EvaluationConfig

        return EvaluationConfig(
            self.threads,
            self.device,
            self.vocab,
            self.sweep.tasks,
            self.sweep.batch_sequences,
            self.sweep.dtype,
            None if advance is None else advance.answered,
        )


def teacher_records(reader: CacheReader, batch: Batch) -> Records:
    """The cached records of a batch along its positions, where they count."""
    from trainer.logits.reader import read_along

    keys = [key.tobytes() for key in batch.keys]
    return read_along(reader, keys, batch.loss_mask, reader.positions)


def sources_of(context: Context) -> dict[str, Source]:
    """The student, and as far as the run has them the control and the teacher, by role."""
    spec = context.spec
    trained = context.outputs.get("distill", {})
    names = context.job.names
    student: Any = trained.get("student") or names.student
    models: dict[str, tuple[Any, str, str, Any]] = {}
    if spec.distill is not None:
        store = context.run.store
        models["student"] = (store.sub("student"), "main", spec.name, student)
        if "control" in trained:
            name = f"{spec.name} (control)"
            models["control"] = (store.sub("control"), "main", name, trained["control"])
    else:
        model = str(spec.student.model)
        models["student"] = (model, spec.student.revision, label(model), student)
    if spec.teacher is not None:
        model = spec.teacher.model
        models["teacher"] = (model, spec.teacher.revision, label(model), names.teacher)
    return {
        role: Source(role, *told, reference_folder(role, spec, told[-1], context.outputs))
        for role, told in models.items()
    }


def label(model: str) -> str:
    """How a table calls a model: a hub id as it is, a folder by its last telling name."""
    parts = [part for part in model.replace("\\", "/").split("/") if part]
    if not model.startswith("/") and "://" not in model:
        return model
    return parts[-2] if len(parts) > 1 and parts[-1] in ("student", "control") else parts[-1]
