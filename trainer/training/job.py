"""What a training is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.storage import Store
from trainer.corpus.corpus import Corpus
from trainer.corpus.schedule import Schedule, make_schedule
from trainer.spec.sections import CacheSpec, DataSpec, DistillSpec, StudentSpec, TeacherSpec


@dataclass(frozen=True)
class Training:
    """Everything a rank needs to know of one training; picklable.

    stage: "distill" or "control". teacher: None without one, and for the control. cache: the
    teacher's records, None without a teacher; cache_spec: which they are. checkpoints: a folder of
    this training alone. output: where the student's folder goes; last: where the
    last weights go, if the student is not made of them. inputs: what the weights depend on, flat,
    for whoever asks what the checkpoints are of. No `auto` is left in the specs.
    """

    stage: str
    teacher: TeacherSpec | None
    student: StudentSpec
    distill: DistillSpec
    data: DataSpec
    cache_spec: CacheSpec
    seed: int
    corpus: Store
    cache: Store | None
    checkpoints: Store
    output: Store
    last: Store
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def sequences_per_step(self) -> int:
        return self.distill.tokens_per_step // self.data.sequence_length

    def schedule(self, corpus: Corpus) -> Schedule:
        """The order in which this training reads the train part."""
        return make_schedule(corpus, self.data, self.distill, self.seed)
