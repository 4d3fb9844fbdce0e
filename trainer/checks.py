"""Faults of a spec that only the world can tell: models, files, prompts, keys. The same for all
launchers.

Looked for before anything is started that takes memory or other machines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from trainer.identity import Identities
from trainer.models.load import max_length, meta_model, read_config
from trainer.spec.responses import AnswersEndpoint, AnswersFile, ResponsesSpec
from trainer.spec.rules import Sections
from trainer.spec.sections import TeacherSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def world_faults(spec: Sections, found: Identities, stages: Collection[str]) -> list[str]:
    """One line per fault of what the spec names, as far as the `stages` to run need it.

    stages: of prepare, capture, distill and sweep.
    """
    faults = faults_in(lambda: found.teacher_folder) + faults_in(lambda: found.student_folder)
    if faults or not stages:
        return faults  # what follows would only repeat them
    checks: list[Callable[[], Any]] = [lambda: _vocabularies(found)]
    if found.existing is not None:
        checks.append(lambda: found.corpus)
    elif "prepare" in stages:
        checks.append(lambda: _corpus(spec, found))
    if {"capture", "distill"} & set(stages):
        checks.append(lambda: _shardable(spec, found))
    if {"capture", "distill", "sweep"} & set(stages):
        checks.append(lambda: _teacher_teaches(spec, found))
        checks.append(lambda: _student_builds(spec, found))
    faults = [fault for check in checks for fault in faults_in(check)]
    if "distill" in stages and not faults:
        faults += _of_training(spec, found)
    return faults


def faults_in(check: Callable[[], Any], key: str = "") -> list[str]:
    """The ValueError of `check` as one line that begins with `key`; [] without one."""
    try:
        check()
    except ValueError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        prefix = f"{key}: " if key and not lines[0].startswith(key) else ""
        return [prefix + " ".join(lines)]
    return []


def _vocabularies(found: Identities) -> None:
    """Teacher and student must give every token the same id."""
    from trainer.corpus.tokenizer import check_same_vocabulary, vocabulary_size

    if found.teacher_folder is not None and found.student_folder is not None:
        check_same_vocabulary(found.teacher_folder, found.student_folder)
    for role, folder in (("teacher", found.teacher_folder), ("student", found.student_folder)):
        if folder is None or found.loaded_tokenizer is None:
            continue
        config = found.teacher_config if role == "teacher" else read_config(folder)
        assert config is not None
        rows = config.get_text_config().vocab_size
        ids = vocabulary_size(found.loaded_tokenizer)
        if rows < ids:
            raise ValueError(
                f"{role}.model: {rows} embedding rows, but the tokenizer has ids up to {ids - 1}; "
                "give a model that was made for this tokenizer"
            )


def _corpus(spec: Sections, found: Identities) -> None:
    """Sources are there, have their columns, and suffice for the parts; so do prompts."""
    from trainer.corpus.size import check_size

    assert spec.data is not None
    loaded = found.loaded_tokenizer
    tokenizer = spec.tokenizer if loaded is None else loaded
    if found.responses_spec is None:
        check_size(spec.data, tokenizer)
        return

    for fault in responses_faults(spec, tokenizer=tokenizer):
        raise ValueError(fault)


def _shardable(spec: Sections, found: Identities) -> None:
    """ZeRO-3 must be able to shard the teacher where it is asked for."""
    if spec.teacher is not None and spec.teacher.sharding == "zero3":
        from trainer.teacher.sharded import check_shardable

        assert found.teacher_config is not None
        check_shardable(found.teacher_config)


def _teacher_teaches(spec: Sections, found: Identities) -> None:
    """The teacher must be of a verified family and have positions enough."""
    from trainer.models.load import check_family

    if found.teacher_config is None:
        return
    check_family("teacher", found.teacher_config)
    _length(spec, "teacher", found.teacher_config)


def has_student(spec: Sections, found: Identities) -> bool:
    """Whether a student can be built from what the spec says."""
    return not faults_in(lambda: _student_builds(spec, found))


def _student_builds(spec: Sections, found: Identities) -> None:
    """The student must be of a verified family, have positions enough, and make a model."""
    from trainer.models.load import check_family

    student = spec.student
    config = found.student_config
    if spec.distill is not None:  # what is quantized as it is need not be trainable
        key = "student.config.model_type" if student.config is not None else None
        check_family("student", config, "student.init" if student.init == "slice" else key)
    _length(spec, "student", config)
    try:
        meta_model(config)
    except Exception as error:  # transformers raises many kinds for sizes that do not fit
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"student.config: no model can be built from it ({reason})") from None


def _length(spec: Sections, role: str, config: PreTrainedConfig) -> None:
    """Sequences must fit the positions of a model."""
    assert spec.data is not None
    longest = max_length(config)
    if longest is not None and spec.data.sequence_length > longest:
        raise ValueError(
            f"data.sequence_length: {spec.data.sequence_length} is over the {role}'s maximum; "
            f"may be at most {longest}"
        )


def _of_training(spec: Sections, found: Identities) -> list[str]:
    """What a training asks of models and of DeepSpeed that they cannot give."""
    distill = spec.distill
    assert distill is not None
    faults: list[str] = []
    if distill.deepspeed:
        from trainer.training.overlay import overlay_faults

        faults += overlay_faults(distill)
    if spec.student.lora is not None:
        from trainer.models.lora import lora_faults

        faults += lora_faults(spec.student, found.student_config)
    if "hidden" in distill.losses.used():
        from trainer.models.hidden_states import hidden_faults

        assert found.teacher_config is not None
        faults += hidden_faults(distill, found.student_config, found.teacher_config)
    return faults


def responses_faults(
    spec: Sections,
    environ: Mapping[str, str] | None = None,
    *,
    tokenizer: Any = None,  # noqa: ANN401
) -> list[str]:
    """One line per fault that only this machine can tell: keys, files, prompts.

    spec: its sections `teacher`, `data` and `responses`; asked for where prepare will run, on the
    driver. tokenizer: the corpus's, to see whether it can render the answers, and whether those of
    a file suffice.
    """
    from trainer.corpus.chat_template import has_template
    from trainer.responses.answers_file import check_answers_size, check_file
    from trainer.responses.ask import api_key
    from trainer.responses.prompts import check_prompts

    responses = spec.responses
    if responses is None or spec.data is None:
        return []
    origin = responses.origin
    try:
        if isinstance(origin, AnswersEndpoint):
            api_key(origin, os.environ if environ is None else environ)
        if isinstance(origin, AnswersFile):
            chats = {"responses.from.file": check_file(origin)}
        else:
            chats = check_prompts(spec.data)
        if origin == "teacher":
            _check_length(responses, getattr(spec, "teacher", None))
    except ValueError as error:
        return [" ".join(str(error).split())]
    if tokenizer is None:
        return []
    if any(chats.values()) and not has_template(tokenizer):
        name = getattr(tokenizer, "name_or_path", "that is trained on the corpus")
        return [
            f"{key}: holds messages, which need a chat template, and the tokenizer {name} has "
            "none; give prompts and completions that are texts, or a model with a chat template"
            for key, is_chat in chats.items()
            if is_chat
        ]
    try:
        if isinstance(origin, AnswersFile):
            check_answers_size(origin, spec.data, tokenizer)
    except ValueError as error:
        return [" ".join(str(error).split())]
    return []


def _check_length(responses: ResponsesSpec, teacher: TeacherSpec | None) -> None:
    """Raises ValueError, one line, where no prompt at all could leave room for an answer."""
    from trainer.models.load import find_model, max_length, read_config

    if teacher is None:
        return
    folder = find_model("teacher.model", teacher.model, teacher.revision)
    positions = max_length(read_config(folder))
    if positions is not None and responses.max_new_tokens >= positions:
        raise ValueError(
            f"responses.max_new_tokens: got {responses.max_new_tokens}; may be less than the "
            f"teacher's {positions} positions, which hold the prompts too"
        )
