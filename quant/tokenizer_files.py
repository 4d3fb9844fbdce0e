"""The files of a tokenizer in a model's folder: which they are, and copying them to another."""

from __future__ import annotations

import shutil
from pathlib import Path

TEMPLATES = "additional_chat_templates"  # a folder, as transformers.utils.hub calls it
VOCABULARIES = {  # any of which a tokenizer can be read from
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
}
OTHERS = {
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
}


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file (or the folder of chat templates) is a tokenizer's."""
    if path.is_dir():
        return path.name == TEMPLATES
    return path.name in VOCABULARIES | OTHERS or path.suffix == ".tiktoken"


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer's vocabulary is there."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what a tokenizer is read from, with its chat templates."""
    for path in sorted(source.iterdir()):
        if is_tokenizer_file(path):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, target / path.name)
