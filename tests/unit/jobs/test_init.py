"""What `stillhouse init` writes loads without faults, whatever the models are called."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.init import DEFAULT_DATA, render, run_name
from jobs.load import load_spec
from jobs.schema import json_schema
from jobs.spec import NAME, JobSpec

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
    spec = loaded(render("a/b", "c/d"), tmp_path)
    least = {
        "name": "b-to-d",
        "teacher": {"model": "a/b"},
        "student": {"model": "c/d"},
        "data": {"train": [{"source": DEFAULT_DATA}]},
    }
    assert spec == JobSpec.model_validate(least)


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
