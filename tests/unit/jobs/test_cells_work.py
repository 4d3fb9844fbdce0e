"""What the sweep's tasks leave in a run."""

from __future__ import annotations

from pathlib import Path

from cluster.storage import Attempt, open_store
from jobs.cells.work import upload


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
