"""Tiny models in a directory of their own, where commands run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.fixtures.corpora import save_model
from tests.fixtures.model_commands import run
from trainer.corpus.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plain model in `model`, each byte of a text a token; untied."""
    place = tmp_path_factory.mktemp("models")
    train_tokenizer(["a"], 258, place / "tokenizer")
    save_model(place / "model", place / "tokenizer", tied=False)
    return place


@pytest.fixture(autouse=True)
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in a directory of their own, with `model` in it, on one thread."""
    shutil.copytree(folder / "model", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def artifact(here: Path) -> Path:
    """The model in 4 bits, with its tokenizer, in `q4`."""
    assert run("quantize model --bits 4 --group-size 32 --out q4") == 0
    return here / "q4"
