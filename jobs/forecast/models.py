"""The models of a spec, from their configs alone, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jobs.errors import SpecErrors
from jobs.forecast.parameters import Shape, shape_of
from jobs.forecast.stage_memory import Models, swept
from jobs.spec.job import JobSpec
from quant.grid import grid
from quant.quant_spec import CHANNEL
from trainer.checks import faults_in
from trainer.identity import Identities
from trainer.models.load import check_family, find_model


def read_models(spec: JobSpec, names: Identities | None = None) -> Models:
    """Teacher and student. Raises SpecErrors, with all faults, for what cannot be planned.

    names: where the models have been found already; None: they are looked up, without weights.
    """
    assert spec.data is not None
    faults: list[str] = []

    def read(make: Callable[[], Shape | None]) -> Shape | None:
        found: list[Shape | None] = [None]

        def look() -> None:
            found[0] = make()

        faults.extend(faults_in(look))
        return found[0]

    teacher = read(partial(_teacher, spec, names))
    if faults:
        raise SpecErrors(faults)
    student = read(partial(_student, spec, names, teacher))
    if faults or student is None:
        raise SpecErrors(faults)
    models = Models(teacher, student)
    for role, shape in (("teacher", teacher), ("student", student)):
        if shape is not None:
            faults += _length_faults(spec, role, shape)
    if spec.sweep is not None:
        faults += _group_faults(with_group_sizes(spec, models), models)
    if faults:
        raise SpecErrors(faults)
    return models


def _teacher(spec: JobSpec, names: Identities | None) -> Shape | None:
    teacher = spec.teacher
    if teacher is None:
        return None
    folder = None if names is None else names.teacher_folder
    if folder is None:
        folder = find_model("teacher.model", teacher.model, teacher.revision, weights=False)
    raw = _read(folder / "config.json")
    check_family("teacher", _config(raw))
    return shape_of(raw)


def _student(spec: JobSpec, names: Identities | None, teacher: Shape | None) -> Shape:
    student = spec.student
    if student.init == "slice":
        assert teacher is not None and student.layers is not None
        if student.layers > teacher.layers:
            raise ValueError(
                f"student.layers: got {student.layers}; may be 1 to {teacher.layers}, the layers "
                "of the teacher, with init: slice"
            )
        from trainer.models.slicing import kept_layers

        kept = kept_layers(teacher.layers, student.layers)
        raw = {
            key: [value[layer] for layer in kept]
            if isinstance(value, list) and len(value) == teacher.layers and "layer" in key
            else value
            for key, value in teacher.raw.items()
        }
        raw = {**raw, "num_hidden_layers": student.layers}
    elif student.config is None:
        folder = None if names is None else names.student_folder
        if folder is None:
            model = str(student.model)
            folder = find_model("student.model", model, student.revision, weights=False)
        raw = _read(folder / "config.json")
    else:
        raw = student.config if isinstance(student.config, dict) else _read(Path(student.config))
        rows = _vocabulary(spec, teacher)
        assert spec.data is not None
        raw = {"max_position_embeddings": spec.data.sequence_length, **raw, "vocab_size": rows}
    if spec.distill is not None:
        key = "student.config.model_type" if student.config is not None else None
        check_family("student", _config(raw), "student.init" if student.init == "slice" else key)
    return shape_of(raw)


def _vocabulary(spec: JobSpec, teacher: Shape | None) -> int:
    """Ids of the tokenizer, which a student of new weights has rows for."""
    if spec.tokenizer is not None:
        return spec.tokenizer.train
    model = spec.teacher.model if spec.teacher is not None else spec.student.model
    file = Path(str(model)).expanduser() / "tokenizer.json"
    if file.is_file():
        told = _read(file)
        ids = [token["id"] for token in told.get("added_tokens", [])]
        vocab = told.get("model", {}).get("vocab", {})
        ids += vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]
        return max(ids) + 1
    if teacher is None:
        raise ValueError(f"{file}: missing, so the student's vocabulary is not known")
    return teacher.vocab


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds no JSON object; give a transformers config")
    return raw


def _config(raw: dict[str, Any]) -> Any:  # noqa: ANN401
    """A raw config as far as `check_family` looks at it."""
    text = SimpleNamespace(model_type=(raw.get("text_config") or raw).get("model_type"))
    return SimpleNamespace(model_type=raw.get("model_type"), get_text_config=lambda: text)


def _length_faults(spec: JobSpec, role: str, shape: Shape) -> list[str]:
    assert spec.data is not None
    if shape.positions is None or spec.data.sequence_length <= shape.positions:
        return []
    return [
        f"data.sequence_length: {spec.data.sequence_length} is over the {role}'s maximum; may be "
        f"at most {shape.positions}"
    ]


def with_group_sizes(spec: JobSpec, models: Models) -> JobSpec:
    """The spec with `sweep.group_size: auto` replaced by sizes for the models of the grid.

    Raises SpecErrors where `sweep.exclude` leaves no cell of them.
    """
    if spec.sweep is None:
        return spec
    widths = {matrix.columns for shape in swept(models, spec).values() for matrix in shape.matrices}
    try:
        return spec.model_copy(update={"sweep": spec.sweep.with_group_sizes(widths)})
    except ValueError as error:
        raise SpecErrors([str(error)]) from None


def _group_faults(spec: JobSpec, models: Models) -> list[str]:
    """Group sizes must divide the rows of all that is quantized."""
    assert spec.sweep is not None
    faults = {}
    for cell in grid(spec.sweep):
        size = cell.spec.group_size
        for matrix in swept(models, spec)[cell.model].matrices:
            if size != CHANNEL and matrix.columns % int(size):
                faults[size, matrix.columns] = (
                    f"sweep.group_size: {size} does not divide the {matrix.columns} inputs of "
                    f"{matrix.name} of the {cell.model}; may be a divisor of it, or channel"
                )
    return list(faults.values())
