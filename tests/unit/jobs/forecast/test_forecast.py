"""Tokens, hours, break-even, storage and the record of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import open_store
from jobs.errors import SpecErrors
from jobs.forecast.forecast import forecast, record
from jobs.forecast.place import named_place
from jobs.forecast.storage import PREPARED, bytes_per_token
from jobs.spec.load import spec_of
from tests.fixtures.forecast_models import plan_of, spec_data
from trainer.corpus.identity import settings
from trainer.models.load import tokenizer_identity

READ = 1000 * 1048576


def test_hours_are_operations_over_peak_and_utilisation(tmp_path) -> None:
    plan = plan_of(tmp_path, sweep=None)
    distill, capture = plan["stages"]["distill"], plan["stages"]["capture"]
    # 6 N D, with recomputing 8 N D, within what attention and the head make of it.
    assert distill["flops"] == pytest.approx(8 * 7.5e9 * READ, rel=0.15)
    assert capture["flops"] == pytest.approx(2 * 69.5e9 * (READ + 512 * 4096), rel=0.15)
    seconds = distill["flops"] / (16 * 989e12 * distill["utilisation"])
    assert distill["seconds"] == pytest.approx(seconds, rel=0.01)
    assert distill["device_hours"] == pytest.approx(16 * distill["seconds"] / 3600, rel=1e-3)
    cost = plan["cost"]
    assert cost["money"] == pytest.approx(2.0 * cost["gpu_hours"])
    assert cost["seconds"] == pytest.approx(distill["seconds"] + capture["seconds"])


def test_what_costs_time(tmp_path) -> None:
    roots = iter("abcdefgh")

    def hours(stage: str = "distill", **changes: Any) -> float:
        return plan_of(tmp_path / next(roots), **changes)["stages"][stage]["device_hours"]

    recomputed = hours()
    assert hours(distill__activation_checkpointing=False) == pytest.approx(
        recomputed * 3 / 4, rel=0.03
    )
    assert hours(distill__control=True) == pytest.approx(2 * recomputed, rel=0.01)
    assert hours(distill__mode="online") > 3 * recomputed
    assert hours(student__lora={}) < recomputed
    assert hours(gpus=32) == pytest.approx(recomputed, rel=0.03)
    assert hours(gpu="a100-80") > 3 * recomputed


@pytest.mark.parametrize(
    "max_tokens, students, passes", [("auto", 2, 1.0), (READ // 4, 1, 4.0), (READ // 2 + 1, 1, 2.0)]
)
def test_break_even(tmp_path, max_tokens, students, passes) -> None:
    """n students read n R tokens; the cache is of U tokens, cheaper where U < n R."""
    found = plan_of(tmp_path, data__max_tokens=max_tokens)["break_even"]
    assert found["passes"] == pytest.approx(passes, rel=0.001)
    read, captured = found["online_tokens_per_student"], found["cached_tokens"]
    assert found["students"] == students
    assert captured < students * read
    assert students == 1 or captured >= (students - 1) * read
    assert found["cached_teacher_hours"] * passes == pytest.approx(
        found["online_teacher_hours_per_student"], rel=0.001
    )


def test_storage_is_the_sum_of_its_parts(tmp_path) -> None:
    sizes = plan_of(tmp_path, distill__control=True, distill__keep_checkpoints=3)["storage"]
    student = 2 * 8_030_261_248
    assert sizes["student"] == sizes["control"] == student
    assert sizes["checkpoint"] == 7 * student  # 14 bytes per parameter
    assert sizes["checkpoints"] == 4 * sizes["checkpoint"] + student
    parts = ("corpus", "student", "control", "checkpoints", "cells")
    assert sizes["total"] == sum(sizes[name] for name in parts) + sizes["cache"]["bytes"]
    cache = sizes["cache"]
    assert cache["train_bytes"] == pytest.approx(cache["train_bytes_per_token"] * READ, rel=0.001)


def test_sets_of_draws_are_as_many_as_epochs_read(tmp_path) -> None:
    roots = iter("abc")

    def sets(**changes: Any) -> int:
        return plan_of(tmp_path / next(roots), **changes)["storage"]["cache"]["sets"]

    assert sets(cache__redraws=4) == 1
    assert sets(cache__redraws=4, data__max_tokens=READ // 2) == 2
    assert sets(cache__redraws=4, data__max_tokens=READ // 8) == 4


def test_without_records_to_learn_from_none_are_captured(tmp_path) -> None:
    plan = plan_of(tmp_path, distill__losses={"ce": 1.0})
    assert plan["stages"]["capture"]["tokens"] == 512 * 4096
    assert plan["storage"]["cache"]["train_bytes"] == 0 and "break_even" not in plan


def test_a_corpus_is_guessed_from_its_files_and_then_known(tmp_path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("word " * 400_000)
    source = [{"source": str(folder / "*.txt")}]
    data = spec_data(tmp_path, data__train=source, data__sequence_length=1024,
                     data__select_sequences=8, data__report_sequences=8)  # fmt: skip
    place = named_place("h200", 16, None)
    tokens = forecast(spec_of(data), place)["tokens"]
    guess = 2_000_000 / bytes_per_token(128256) - 16 * 1024
    assert tokens["corpus"] == pytest.approx(guess, abs=1024)
    assert tokens["train"] == tokens["corpus"] and tokens["epochs"] > 1000
    keys = {
        "select_sequences": 8, "report_sequences": 8, "sequence_length": 1024,
        "packing": "documents", "min_chars": 1, "max_chars": None, "train.0.format": "text",
    }  # fmt: skip
    for name, other in (("other", {"sequence_length": 512}), ("same", {})):
        prepared = tmp_path / "runs" / "_corpora" / name
        prepared.mkdir(parents=True)
        identity = {f"data.{key}": value for key, value in {**keys, **other}.items()}
        tokenizer = tokenizer_identity(tmp_path / "teacher")
        identity |= {f"tokenizer.{key}": value for key, value in tokenizer.items()}
        manifest = {"identity": identity, "parts": {"train": {"sequences": 77}}}
        (prepared / "manifest.json").write_text(json.dumps(manifest))
        found = forecast(spec_of(data), place)["tokens"]["known"]
        assert found == ("guessed from its bytes" if name == "other" else "prepared before")
    assert forecast(spec_of(data), place)["tokens"]["corpus"] == 77 * 1024


def test_a_corpus_that_is_named_is_counted_without_its_sources(tmp_path) -> None:
    from cluster.storage.keys import fingerprint
    from tests.fixtures.corpora import data_spec, make_corpus, write_texts

    made = data_spec(write_texts(tmp_path / "texts"))
    identity = {f"data.{key}": value for key, value in settings(made).items()}
    identity["data.train.0.format"] = "text"
    name = fingerprint(identity)
    store = open_store(tmp_path / "runs").sub("_corpora", name)
    corpus = make_corpus(store, made)
    manifest = store.read_json("manifest.json")
    store.write_json("manifest.json", {**manifest, "identity": identity})
    asked = {
        "train": [{"source": "./gone/*.txt"}], "corpus": name, "sequence_length": 32,
        "select_sequences": 7, "report_sequences": 9,
    }  # fmt: skip
    data = spec_data(tmp_path, data=asked, sweep=None, distill__tokens_per_step=3200)
    place = named_place("h200", 16, None)
    tokens = forecast(spec_of(data), place)["tokens"]
    assert tokens["corpus"] == 32 * len(corpus.part("train")) and tokens["known"] == PREPARED
    asked["corpus"] = "0" * 32
    with pytest.raises(SpecErrors, match="data.corpus"):
        forecast(spec_of({**data, "data": asked}), place)


@pytest.mark.parametrize("vocab, measured", [(2048, 1_921_722 / 612_096), (128256, 4.4)])
def test_bytes_per_token_of_english(vocab, measured) -> None:
    assert bytes_per_token(vocab) == pytest.approx(measured, rel=0.05)


def test_a_record_is_json_of_the_cluster_and_never_fails(tmp_path) -> None:
    spec = spec_of(spec_data(tmp_path))
    found = record(spec, [(64, 8), (64, 8)], "NVIDIA H200", 1e12)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["place"]["gpu"] == "h200" and found["fits"] is True
    unknown = record(spec, [(64, 8)], "GPU of tomorrow")
    assert unknown["fits"] is None and unknown["cost"]["gpu_hours"] is None
    assert unknown["stages"]["distill"]["memory"]["total"] > 16e9
    cpus = record(spec, [(4, 0)], None, 32e9)
    assert cpus["fits"] is False
    gone = spec_of(spec_data(tmp_path / "b", student__model=str(tmp_path / "gone")))
    assert "student.model" in record(gone, [(4, 0)])["faults"][0]


def test_every_recipe_that_needs_no_hub_has_a_plan(tmp_path, monkeypatch) -> None:
    from jobs.spec.load import load_spec

    monkeypatch.chdir(tmp_path)
    plan = forecast(load_spec("demo-teacher"), named_place("l4", 1, None))
    assert plan["models"]["student"]["parameters"] == 1_967_808  # as the run itself counts
    assert Path(tmp_path / "runs").exists() is False
