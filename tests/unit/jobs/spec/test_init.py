"""What `stillhouse init` writes loads without faults, whatever the models are called."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.forecast.forecast import forecast
from jobs.forecast.place import named_place
from jobs.spec.init import DEFAULT_DATA, render, run_name
from jobs.spec.job import NAME, JobSpec
from jobs.spec.load import json_schema, load_spec

PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=80)


def loaded(text: str, folder: Path) -> JobSpec:
    file = folder / "spec.yaml"
    file.write_text(text, encoding="utf-8")
    return load_spec(file)


def test_the_spec_says_what_was_asked_for(tmp_path: Path) -> None:
    text = render("Qwen/Qwen3-8B", "./models/Small Ones", "texts/*.jsonl", "my.yaml")
    spec = loaded(text, tmp_path)
    assert spec.teacher is not None and spec.data is not None
    assert spec.name == "qwen3-8b-to-small-ones"
    assert (spec.teacher.model, spec.student.model) == ("Qwen/Qwen3-8B", "./models/Small Ones")
    assert spec.data.train[0].source == "texts/*.jsonl"
    assert "stillhouse run my.yaml" in text
    jsonschema.validate(yaml.safe_load(text), json_schema())


def test_the_values_are_the_defaults_of_the_spec(tmp_path: Path) -> None:
    # A value written out must not drift from what leaving it out means.
    spec = loaded(render("a/b", "c/d", "texts/*.txt"), tmp_path)
    least = {
        "name": "b-to-d",
        "teacher": {"model": "a/b"},
        "student": {"model": "c/d"},
        "data": {"train": [{"source": "texts/*.txt"}]},
    }
    assert spec == JobSpec.model_validate(least)


def config(folder: Path, **values: int) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
    return str(folder)


def test_the_prose_of_python_suffices_for_the_held_out_parts(tmp_path: Path) -> None:
    spec = loaded(render("a/b", "c/d", DEFAULT_DATA), tmp_path)
    assert spec.data is not None and spec.distill is not None
    held_out = spec.data.select_sequences + spec.data.report_sequences
    assert held_out * spec.data.sequence_length < 200_000  # of the 400,000 tokens of a real BPE
    assert spec.distill.tokens_per_step % spec.data.sequence_length == 0


def test_sequences_fit_the_positions_of_local_models(tmp_path: Path) -> None:
    teacher = config(tmp_path / "t", max_position_embeddings=4096)
    student = config(tmp_path / "s", n_positions=768)
    spec = loaded(render(teacher, student, "texts/*.txt"), tmp_path)
    assert spec.data is not None and spec.distill is not None
    assert spec.data.sequence_length == 768
    assert spec.distill.tokens_per_step % 768 == 0
    spec = loaded(render(teacher, "c/d", "texts/*.txt"), tmp_path)
    assert spec.data is not None and spec.data.sequence_length == 2048


@pytest.mark.parametrize(("layers", "kept"), [(30, 15), (7, 3), (1, 1)])
def test_a_slice_has_half_of_the_layers_of_the_teacher(
    tmp_path: Path, layers: int, kept: int
) -> None:
    teacher = config(tmp_path / "t", num_hidden_layers=layers)
    spec = loaded(render(teacher, "slice"), tmp_path)
    assert (spec.student.init, spec.student.layers, spec.student.model) == ("slice", kept, None)


@pytest.mark.parametrize("text", ["{}", "[1]", "no JSON", None])
def test_a_slice_of_a_teacher_that_is_not_here_is_refused(tmp_path: Path, text: str | None) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json") as caught:
        render(str(folder), "slice")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("student", ["itself", "slice"])
def test_plan_accepts_what_init_writes_for_smollm2(tmp_path: Path, student: str) -> None:
    # Its width is 9 x 64: groups of 128 do not divide it.
    teacher = config(
        tmp_path / "smollm2",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    spec = loaded(render(teacher, teacher if student == "itself" else student), tmp_path)
    found = forecast(spec, named_place("h100", 1, None))
    assert found["resolved"]["sweep.group_size"] == [32, 64]
    assert found["models"]["student"]["layers"] == (30 if student == "itself" else 15)


def test_another_format_is_one_word_away(tmp_path: Path) -> None:
    text = render("a/b", "c/d", "chats.jsonl").replace("format: text ", "format: messages ")
    spec = loaded(text, tmp_path)
    assert spec.data is not None
    assert (spec.data.train[0].format, spec.data.train[0].column) == ("messages", None)


def test_every_key_has_a_comment_or_explains_itself() -> None:
    text = render("a/b", "c/d")
    sections = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert [line.split(":")[0] for line in sections] == [
        "name",
        "seed",
        "storage",
        "teacher",
        "student",
        "data",
        "cache",
        "distill",
        "sweep",
        "resources",
        "tracking",
    ]
    assert text.count("#") > 20


@settings(max_examples=60, deadline=None)
@given(teacher=PRINTABLE, student=PRINTABLE, data=PRINTABLE)
def test_any_name_makes_a_spec_that_loads(
    tmp_path_factory: pytest.TempPathFactory, teacher: str, student: str, data: str
) -> None:
    spec = loaded(render(teacher, student, data), tmp_path_factory.mktemp("init"))
    assert spec.teacher is not None and spec.data is not None
    assert (spec.teacher.model, spec.student.model) == (teacher, student)
    assert spec.data.train[0].source == data


@given(teacher=st.text(), student=st.text())
def test_run_names_are_plain(teacher: str, student: str) -> None:
    assert NAME.fullmatch(run_name(teacher, student))


def test_run_names() -> None:
    assert run_name("Qwen/Qwen3-8B", "s3://b/Qwen3-0.6B/") == "qwen3-8b-to-qwen3-0.6b"
    assert run_name("///", "__") == "model-to-model"
    assert len(run_name("x" * 90, "y" * 90)) == 62
