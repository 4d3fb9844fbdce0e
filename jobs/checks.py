"""Faults that only the world can tell: files, models, storage. Looked for before Ray starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cluster.storage import open_store
from jobs.spec import JobSpec
from trainer.identity import Identities
from trainer.job import identities
from trainer.models import max_length, meta_model, new_config, read_config


def storage_faults(spec: JobSpec) -> list[str]:
    """Faults of the storage: unknown protocol, not writable."""
    return _faults(lambda: open_store(spec.storage).check_writable(), "storage")


def spec_faults(spec: JobSpec, stages: list[str]) -> list[str]:
    """One line per fault of what the spec names, as far as the `stages` to run need it."""
    found = identities(spec)
    faults = _faults(lambda: found.teacher_folder) + _faults(lambda: found.student_folder)
    if faults:
        return faults  # what follows would only repeat them
    checks: list[Callable[[], Any]] = []
    if set(stages) - {"summarize"}:
        checks.append(lambda: _vocabularies(found))
    if "prepare" in stages:
        checks.append(lambda: _corpus(spec, found))
    if "capture" in stages:
        checks.append(lambda: _shardable(spec, found))
    if {"capture", "distill", "sweep"} & set(stages):
        faults = _faults(lambda: _student_builds(spec, found))
        checks.append(lambda: _length(spec, "teacher", found.teacher_folder))
        checks.append(lambda: _length(spec, "student", found.student_folder))
        if "sweep" in stages and spec.sweep is not None and not faults:
            for size in spec.sweep.group_size:
                faults += _faults(partial(_group_size, spec, found, size), "sweep.group_size")
    return faults + [fault for check in checks for fault in _faults(check)]


def _faults(check: Callable[[], Any], key: str = "") -> list[str]:
    try:
        check()
    except ValueError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        prefix = f"{key}: " if key and not lines[0].startswith(key) else ""
        return [prefix + " ".join(lines)]
    return []


def _vocabularies(found: Identities) -> None:
    """Teacher and student must give every token the same id."""
    from trainer.corpus.tokenizer import check_same_vocabulary, load_tokenizer, vocabulary_size

    if found.teacher_folder is not None and found.student_folder is not None:
        check_same_vocabulary(found.teacher_folder, found.student_folder)
    for role, folder in (("teacher", found.teacher_folder), ("student", found.student_folder)):
        if folder is None or found.tokenizer_folder is None:
            continue
        rows = read_config(folder).get_text_config().vocab_size
        ids = vocabulary_size(load_tokenizer(found.tokenizer_folder))
        if rows < ids:
            raise ValueError(
                f"{role}.model: {rows} embedding rows, but the tokenizer has ids up to {ids - 1}; "
                "give a model that was made for this tokenizer"
            )


def _corpus(spec: JobSpec, found: Identities) -> None:
    """Sources are there, have their columns, and suffice for the parts."""
    from trainer.corpus.size import check_size
    from trainer.corpus.tokenizer import load_tokenizer

    assert spec.data is not None
    folder = found.tokenizer_folder
    check_size(spec.data, spec.tokenizer if folder is None else load_tokenizer(folder))


class _Tokens:
    """Stands for a tokenizer that is not trained yet: its size is known, its ids are not."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {"": self.size - 1}


def student_config(spec: JobSpec, found: Identities) -> Any:
    """The student's transformers config, as it will be built."""
    assert spec.data is not None
    if spec.student.config is None:
        assert found.student_folder is not None
        return read_config(found.student_folder)
    if spec.tokenizer is not None:
        tokenizer: Any = _Tokens(spec.tokenizer.train)
    else:
        from trainer.corpus.tokenizer import load_tokenizer

        assert found.tokenizer_folder is not None
        tokenizer = load_tokenizer(found.tokenizer_folder)
    length = spec.data.sequence_length
    return new_config("student.config", spec.student.config, tokenizer, length)


def _student_builds(spec: JobSpec, found: Identities) -> None:
    """The student's config must make a model."""
    config = student_config(spec, found)
    if spec.student.config is not None:
        _length(spec, "student", config)
    try:
        meta_model(config)
    except Exception as error:  # transformers raises many kinds for sizes that do not fit
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"student.config: no model can be built from it ({reason})") from None


def _length(spec: JobSpec, role: str, model: Any) -> None:
    """Sequences must fit the positions of a model, given by its folder or its config."""
    if model is None:
        return
    assert spec.data is not None
    longest = max_length(read_config(model) if isinstance(model, Path) else model)
    if longest is not None and spec.data.sequence_length > longest:
        raise ValueError(
            f"data.sequence_length: {spec.data.sequence_length} is over the {role}'s maximum; "
            f"may be at most {longest}"
        )


def _shardable(spec: JobSpec, found: Identities) -> None:
    """ZeRO-3 must be able to shard the teacher where it is asked for."""
    from trainer.teacher.experts import check_shardable

    if spec.teacher is not None and spec.teacher.sharding == "zero3":
        assert found.teacher_folder is not None
        check_shardable(read_config(found.teacher_folder))


def _group_size(spec: JobSpec, found: Identities, size: int) -> None:
    """A group size must divide every layer."""
    from quant.quantize import check_group_size

    check_group_size(student_config(spec, found), [size])
