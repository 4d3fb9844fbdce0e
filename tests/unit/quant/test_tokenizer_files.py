"""Which files of a model's folder are its tokenizer's."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from trainer.corpus.tokenizer import TEMPLATES, copy_tokenizer, has_tokenizer, is_tokenizer_file


def test_the_folder_of_templates_is_transformers_own() -> None:
    assert TEMPLATES == CHAT_TEMPLATE_DIR


def test_everything_of_a_tokenizer_is_copied_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / TEMPLATES).mkdir(parents=True)
    (source / "checkpoints").mkdir()
    target.mkdir()
    wanted = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "qwen.tiktoken"]
    for name in (*wanted, f"{TEMPLATES}/tool_use.jinja", "model.safetensors", "config.json"):
        (source / name).write_text(name)
    copy_tokenizer(source, target)
    copied = sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file())
    assert copied == sorted([*wanted, f"{TEMPLATES}/tool_use.jinja"])
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"])
def test_a_vocabulary_makes_a_tokenizer(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not has_tokenizer(tmp_path)
    (tmp_path / name).write_text("")
    assert has_tokenizer(tmp_path)


def test_a_folder_that_is_called_like_a_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    assert not is_tokenizer_file(tmp_path / "tokenizer.json")
    assert not has_tokenizer(tmp_path)
