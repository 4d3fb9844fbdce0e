"""What exactly a job's corpus, logit cache and student are: flat mappings, and names made of them.

Two jobs with equal identities share the result; a difference can be shown key by key.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage import Store
from cluster.storage.keys import flatten
from trainer.corpus.identity import corpus_identity
from trainer.logits.records import VERSION as CACHE_FORMAT
from trainer.models.load import (
    UntrainedTokenizer,
    find_model,
    identity,
    new_config,
    read_config,
    tokenizer_identity,
)
from trainer.spec.responses import ResponsesSpec
from trainer.spec.sections import CacheSpec, DataSpec, StudentSpec, TeacherSpec, TokenizerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Identities:
    """Identities of one job's parts; what is looked up is looked up once.

    All raise ValueError, one line, for a model or a source that is not there.
    """

    teacher_spec: TeacherSpec | None
    student_spec: StudentSpec
    tokenizer_spec: TokenizerSpec | None
    data: DataSpec
    cache_spec: CacheSpec
    responses_spec: ResponsesSpec | None = None
    existing: Store | None = None  # the corpus of data.corpus
    train_sequences: int | None = None  # as many of train as are read; None: all there are

    @cached_property
    def teacher_folder(self) -> Path | None:
        """The teacher's local folder."""
        teacher = self.teacher_spec
        if teacher is None:
            return None
        return find_model("teacher.model", teacher.model, teacher.revision)

    @cached_property
    def student_folder(self) -> Path | None:
        """The folder that the student starts from."""
        student = self.student_spec
        if student.model is None:
            return None
        pretrained = student.init == "pretrained"
        return find_model("student.model", student.model, student.revision, weights=pretrained)

    @cached_property
    def tokenizer_folder(self) -> Path | None:
        """The folder whose tokenizer is used: the teacher's, else the student's; None = trained."""
        if self.tokenizer_spec is not None:
            return None
        return self.teacher_folder or self.student_folder

    @cached_property
    def teacher_config(self) -> PreTrainedConfig | None:
        """The teacher's transformers config."""
        folder = self.teacher_folder
        return None if folder is None else read_config(folder)

    @cached_property
    def student_config(self) -> PreTrainedConfig:
        """The student's transformers config, as it will be built."""
        student = self.student_spec
        if student.init == "slice":
            from trainer.models.slicing import sliced_config

            assert self.teacher_config is not None and student.layers is not None
            return sliced_config(self.teacher_config, student.layers)
        if student.config is None:
            assert self.student_folder is not None
            return read_config(self.student_folder)
        length = self.data.sequence_length
        return new_config("student.config", student.config, self._tokens, length)

    @cached_property
    def loaded_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, None where one is to be trained."""
        from trainer.corpus.tokenizer import load_tokenizer

        return None if self.tokenizer_folder is None else load_tokenizer(self.tokenizer_folder)

    @property
    def _tokens(self) -> PreTrainedTokenizerBase | UntrainedTokenizer:
        if self.loaded_tokenizer is not None:
            return self.loaded_tokenizer
        assert self.tokenizer_spec is not None
        return UntrainedTokenizer(self.tokenizer_spec.train)

    @cached_property
    def teacher(self) -> dict[str, str]:
        """The teacher's name, revision, config, weights and dtype."""
        teacher, folder = self.teacher_spec, self.teacher_folder
        if teacher is None or folder is None:
            return {}
        return {**identity(folder, teacher.model), "dtype": teacher.dtype}

    @cached_property
    def student(self) -> dict[str, Any]:
        """What the student starts from, and what of it is trained."""
        student = self.student_spec
        result: dict[str, Any] = {"init": student.init}
        if student.lora is not None:
            result |= flatten(student.lora.model_dump(), "lora")
        if student.init == "slice":
            assert self.teacher_spec is not None and self.teacher_folder is not None
            cut_from = identity(self.teacher_folder, self.teacher_spec.model)
            return {**result, **cut_from, "layers": student.layers}
        if self.student_folder is not None:
            return {**result, **identity(self.student_folder, str(student.model))}
        if isinstance(student.config, str):
            return {**result, "config": Path(student.config).read_text()}
        return {**result, **flatten(student.config, "config")}

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """The tokenizer's files, or the settings of one that is to be trained."""
        if self.tokenizer_folder is None:
            assert self.tokenizer_spec is not None
            return {"train": self.tokenizer_spec.train}
        return dict(tokenizer_identity(self.tokenizer_folder))

    @cached_property
    def responses(self) -> dict[str, Any]:
        """Everything that decides the answers of distill.mode: responses."""
        from trainer.responses.store import responses_identity

        assert self.responses_spec is not None
        return responses_identity(
            self.responses_spec, self.data, self.teacher, self.tokenizer, self.teacher_folder
        )

    @cached_property
    def corpus(self) -> dict[str, Any]:
        """Everything that decides the sequences; not how often they are read. With responses: as
        far as it is known before there are answers (see `trainer.stage_inputs.corpus_of`)."""
        if self.existing is not None:
            from trainer.corpus.corpus import existing_identity

            return existing_identity(self.data, self.existing, self.tokenizer, self.train_sequences)
        if self.responses_spec is not None:
            from trainer.responses.store import corpus_of_answers

            return corpus_of_answers(
                self.data, self.tokenizer, self.responses, self.train_sequences
            )
        return corpus_identity(self.data, self.tokenizer, self.train_sequences)

    @cached_property
    def cache(self) -> dict[str, Any]:
        """What the records of the logit cache are of; the corpus is no part of it."""
        return {
            "format": CACHE_FORMAT,
            **flatten(self.teacher, "teacher"),
            **flatten(self.tokenizer, "tokenizer"),
            **flatten(self.cache_spec.identity(), "cache"),
            "attention": self.data.packing,
        }
