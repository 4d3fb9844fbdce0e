"""What the sweep's tasks leave in a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.storage import Attempt, Fenced, open_store
from jobs.sweep.tasks import made_before, publish_made, upload


def test_a_cell_made_again_keeps_nothing_of_the_one_before(tmp_path: Path) -> None:
    store, place = open_store(tmp_path / "run"), "cells/hqq-4b-g64/model"
    for name in ("model.safetensors", "quant.json", "tokenizer.json"):
        store.write_text(f"{place}/{name}", "old")
    store.write_text("cells/hqq-8b-g64/model/model.safetensors", "another cell's")
    made = tmp_path / "made"
    (made / "additional_chat_templates").mkdir(parents=True)
    for name in ("quantized.safetensors", "quant.json", "additional_chat_templates/tools.jinja"):
        (made / name).write_text("new")
    upload(Attempt.claim(store), made, place)
    found = {name: store.read_text(name) for name in store.glob(f"{place}/**")}
    assert found == {
        f"{place}/{name}": "new"
        for name in ("quantized.safetensors", "quant.json", "additional_chat_templates/tools.jinja")
    }
    assert store.exists("cells/hqq-8b-g64/model/model.safetensors")


def folder_of(path: Path, text: str) -> Path:
    """A model folder, as far as it matters here."""
    path.mkdir()
    (path / "config.json").write_text(text)
    return path


def test_a_model_is_taken_up_only_whole_and_by_the_cell_it_was_made_for(tmp_path: Path) -> None:
    store = open_store(tmp_path / "run")
    attempt, key = Attempt.claim(store), "hqq-4b-g64"
    assert made_before(store, key, "print") is None
    publish_made(attempt, folder_of(tmp_path / "one", "1"), key, "print", {"quantize_s": 2.0})
    found = made_before(store, key, "print")
    assert found is not None and found["quantize_s"] == 2.0
    assert made_before(store, key, "another print") is None
    assert made_before(store, "hqq-2b-g64", "print") is None
    store.delete(f"cells/{key}/model", recursive=True)
    assert made_before(store, key, "print") is None


def test_a_model_that_is_being_replaced_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "run")
    attempt, key = Attempt.claim(store), "hqq-4b-g64"
    publish_made(attempt, folder_of(tmp_path / "old", "old"), key, "old print", {})

    def lost(*_: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("jobs.sweep.tasks.upload", lost)
    with pytest.raises(ConnectionError):
        publish_made(attempt, folder_of(tmp_path / "new", "new"), key, "new print", {})
    # Its files may be of both by now.
    assert made_before(store, key, "old print") is None
    assert made_before(store, key, "new print") is None


def test_an_attempt_that_was_overtaken_publishes_no_model(tmp_path: Path) -> None:
    store = open_store(tmp_path / "run")
    attempt = Attempt.claim(store)
    Attempt.claim(store)
    with pytest.raises(Fenced):
        publish_made(attempt, folder_of(tmp_path / "one", "1"), "hqq-4b-g64", "print", {})
    assert made_before(store, "hqq-4b-g64", "print") is None
