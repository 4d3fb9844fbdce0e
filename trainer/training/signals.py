"""The teacher's signals: records from the logit cache, or a teacher that runs in the same workers.

    with teacher.signal(inputs) as more:
        loss, sums = engine(**inputs, losses=losses, **more)

The teacher gives its final hidden states and its output head; the logits of a chunk of tokens are
made, compared and dropped inside the student's loss. So nothing is captured, nothing is cut off,
and any temperature will do, at the price of a forward pass of the teacher in every step.

Memory. `teacher.sharding: auto` gives every worker the whole teacher where its weights fit into
60 % of what the student's training leaves of the worker's memory (`placement.training_bytes`:
weights, gradients, master weights and Adam's moments, by ZeRO stage); the rest is for the
activations of both. Else the teacher is sharded over the workers of a node, or over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cluster.storage import Store
from trainer.corpus.corpus import open_corpus
from trainer.corpus.tokenizer import load_tokenizer
from trainer.logits.reader import CacheReader, read_along
from trainer.logits.records import Records, coding_of, train_kinds
from trainer.logits.store import CacheMismatch
from trainer.models import hidden_states
from trainer.models.head import last_hidden
from trainer.models.load import count_parameters, find_model, meta_model, new_config, read_config
from trainer.models.slicing import sliced_config
from trainer.spec.sections import CacheSpec, LoraSpec, TeacherSpec
from trainer.teacher.placement import training_bytes
from trainer.teacher.sharded import largest_layer
from trainer.teacher.teacher import Teacher, load_teacher
from trainer.worker import Worker, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from trainer.training.job import Training


@dataclass(frozen=True)
class CachedTeacher:
    """The records of sequences, for a loss at one temperature.

    readers: one for each set of records; epoch e reads set e modulo their number. length: positions
    of a sequence. tail: which of the temperatures of the records the log tail is of. positions:
    which of a sequence have records, "all" or "loss".
    """

    readers: Sequence[CacheReader]
    length: int
    tail: int = 0
    positions: str = "all"

    @staticmethod
    def for_training(
        cache: Store, spec: CacheSpec, vocab: int, length: int, temperature: float
    ) -> CachedTeacher:
        """For a loss at `temperature`, one of those of the spec, over `vocab` ids.

        Raises CacheMismatch if the records are of another coding.
        """
        readers = [_open(cache, spec, vocab, kind) for kind in train_kinds(spec)]
        tail = spec.temperatures.index(temperature)
        return CachedTeacher(readers, length, tail, spec.positions)

    @staticmethod
    def for_evaluation(cache: Store, spec: CacheSpec, vocab: int, length: int) -> CachedTeacher:
        """For measuring models against the teacher, at temperature 1."""
        readers = [_open(cache, spec, vocab, "eval")]
        return CachedTeacher(readers, length, positions=spec.positions)

    def read(self, keys: Sequence[bytes], epochs: NDArray[np.int64], loss_mask: NDArray) -> Records:
        """The records of `keys`, the i-th as epoch `epochs[i]` reads it, along the positions.

        loss_mask: [sequences, seq], not 0 where a position counts; where it does not, a row may
        be that of another position. Raises MissingRecord for a sequence that is not there,
        CacheDamaged for a damaged one.
        """
        sets = epochs % len(self.readers)
        # A step may lie across two epochs, and then a micro-batch in two sets.
        edges = [0, *(np.flatnonzero(np.diff(sets)) + 1).tolist(), len(sets)]
        parts = [
            self._read(self.readers[sets[start]], keys[start:stop], loss_mask[start:stop])
            for start, stop in zip(edges[:-1], edges[1:], strict=True)
        ]
        return parts[0] if len(parts) == 1 else _join(parts)

    def _read(self, reader: CacheReader, keys: Sequence[bytes], loss_mask: NDArray) -> Records:
        if self.positions == "all":
            return reader.read_many(keys, self.length)
        return read_along(reader, keys, loss_mask, self.positions)

    def close(self) -> None:
        """Closes the readers."""
        for reader in self.readers:
            reader.close()


def _open(cache: Store, spec: CacheSpec, vocab: int, kind: str) -> CacheReader:
    reader, wanted = CacheReader(cache, kind), coding_of(spec, vocab, kind)
    if reader.coding is not None and reader.coding != wanted:
        raise CacheMismatch(
            f"{cache.url}: holds records of {reader.coding}, asked for {wanted}; remove it with: "
            f"stillhouse cache rm {cache.url}"
        )
    return reader


def _join(parts: Sequence[Records]) -> Records:
    """Records for training one after the other along the positions, as wide as the widest."""
    width = max(part.ids.shape[1] for part in parts)
    ids, log_probs = [], []
    for part in parts:
        more = width - part.ids.shape[1]
        ids.append(np.pad(part.ids, ((0, 0), (0, more))))
        ids[-1][:, width - more :] = part.ids[:, :1]
        log_probs.append(np.pad(part.log_probs, ((0, 0), (0, more)), constant_values=-np.inf))
    tails = [part.log_tails for part in parts]
    return Records(np.concatenate(ids), np.concatenate(log_probs), np.concatenate(tails))


class TeacherWithStates(nn.Module):
    """forward(batch) -> final hidden states, and those after some layers."""

    def __init__(self, model: PreTrainedModel, layers: list[int]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of sequences [batch, seq]: [tokens, width]; [batch, seq, width] by entry of `layers`."""
        with hidden_states.collected(self.model, self.layers) as states:
            hidden = last_hidden(self.model, input_ids, position_ids)
        return hidden, [states[layer] for layer in self.layers]


class OnlineTeacher:
    """A loaded teacher; see the module's docstring. parameters: of the whole, tied ones once."""

    def __init__(self, teacher: Teacher, vocab: int, *, dense: bool, states: bool) -> None:
        self._teacher, self._vocab = teacher, vocab
        self._dense, self._states = dense, states
        self.parameters = teacher.parameters

    @classmethod
    def load(cls, job: Training, vocab: int, worker: Worker) -> OnlineTeacher:
        """The teacher of a training with mode online, as its spec asks for; collective.

        It stays as it is: evaluation mode, no gradients, `teacher.dtype`. Raises ValueError, one
        line, for a teacher that cannot be run, or does not fit beside the student.
        """
        assert job.teacher is not None, "mode online has a teacher"
        losses = job.distill.losses
        config = student_config(job)
        plan = None
        if "hidden" in losses.used():
            plan = hidden_states.hidden_pairs(losses.hidden, config, teacher_config(job.teacher))
        layers = [] if plan is None else plan.teacher_layers
        teacher = load_teacher(
            job.teacher,
            vocab,
            worker,
            lambda model: TeacherWithStates(model, layers),
            stage=job.stage,
            reserve=student_bytes(job, config, worker),
        )
        return cls(teacher, vocab, dense=bool(losses.of_distributions()), states=plan is not None)

    @contextmanager
    def signal(self, inputs: dict[str, Tensor | None]) -> Iterator[dict[str, Any]]:
        """The keyword arguments that the teacher adds to a `StudentWithLoss.forward`.

        inputs: of that forward, as `loader.MicroBatch.to` gives them. What is given is valid, and
        in memory, inside the context alone. Ranks that share a teacher enter and leave alike.
        """
        with torch.no_grad():
            hidden, states = self._teacher.engine(inputs["input_ids"], inputs["position_ids"])
        more: dict[str, Any] = {"teacher_states": states} if self._states else {}
        try:
            if not self._dense:
                yield more
                return
            with self._teacher.head(self._vocab) as head:
                more |= {"teacher_hidden": hidden, "teacher_head": head}
                yield more
        finally:
            more.clear()  # whoever still holds it holds nothing of the teacher

    def held(self) -> int:
        """Bytes of the teacher's weights on this rank now."""
        return self._teacher.held()

    def close(self) -> None:
        """Frees the teacher; it cannot be called any more."""
        self._teacher.close()


def teacher_config(spec: TeacherSpec) -> PreTrainedConfig:
    """The teacher's transformers config."""
    return read_config(find_model("teacher.model", spec.model, spec.revision, weights=False))


def student_config(job: Training) -> PreTrainedConfig:
    """The student's transformers config, as it will be built."""
    student = job.student
    if student.config is not None:
        tokenizer = load_tokenizer(open_corpus(job.corpus).tokenizer_folder())
        length = job.data.sequence_length
        return new_config("student.config", student.config, tokenizer, length)
    if student.model is not None:
        return read_config(
            find_model("student.model", student.model, student.revision, weights=False)
        )
    assert job.teacher is not None and student.layers is not None  # init: slice
    return sliced_config(teacher_config(job.teacher), student.layers)


def student_bytes(job: Training, config: PreTrainedConfig, worker: Worker) -> float:
    """Bytes of this worker's memory that the student's training states will need."""
    spec = job.distill
    model = meta_model(config)
    weights = count_parameters(model)
    trained = weights if job.student.lora is None else adapter_parameters(model, job.student.lora)
    return training_bytes(
        weights,
        trained,
        largest_layer(model),
        itemsize=torch_dtype(spec.dtype).itemsize,
        zero_stage=spec.zero_stage,
        world=worker.world,
        offloaded=spec.offload == "cpu" and worker.device.type == "cuda",
    )


def adapter_parameters(model: PreTrainedModel, lora: LoraSpec) -> int:
    """Parameters that adapters of every matrix of every layer have; with fewer targets fewer."""
    blocks = hidden_states.blocks_of(model)
    return sum(lora.r * sum(p.shape) for p in blocks.parameters() if p.ndim == 2)
