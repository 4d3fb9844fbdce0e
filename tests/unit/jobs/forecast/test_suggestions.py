"""Ways to make a job fit: each, taken at its word, gives a plan that fits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.forecast.forecast import forecast
from jobs.forecast.place import named_place
from jobs.spec.load import load_spec
from tests.fixtures.forecast_models import spec_data

CASES: dict[str, dict[str, Any]] = {
    "activations": {"gpu": "a100-80", "gpus": 8, "distill__activation_checkpointing": False},
    "states": {"gpu": "a100-40", "gpus": 8, "distill__zero_stage": 1},
    "whole teacher": {"gpu": "h100", "gpus": 8, "teacher__sharding": "none"},
    "too few": {"gpu": "a100-80", "gpus": 1, "teacher__sharding": "auto"},
    "small cards": {"gpu": "4090", "gpus": 8},
    "online": {"gpu": "a100-80", "gpus": 8, "distill__mode": "online", "teacher__sharding": "none"},
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_named_makes_it_fit(name, tmp_path) -> None:
    changes = dict(CASES[name])
    gpu, gpus = changes.pop("gpu"), changes.pop("gpus")
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec_data(tmp_path, **changes)))
    plan = forecast(load_spec(path), named_place(gpu, gpus, None))
    assert plan["fits"] is False
    named = 0
    for stage, found in plan["stages"].items():
        if found["memory"] and found["memory"]["fits"]:
            assert found["remedies"] == []
            continue
        assert found["remedies"], stage
        for words in found["remedies"]:
            again = taken_at_its_word(path, words, gpu, gpus)
            assert again["stages"][stage]["memory"]["fits"] is True, (stage, words)
            named += 1
    assert named


def taken_at_its_word(path: Path, words: str, gpu: str, gpus: int) -> dict[str, Any]:
    """The plan with the overrides and the number of GPUs that a remedy names."""
    overrides = [word for word in words.split() if not word.startswith("--")]
    more, other = re.search(r"--gpus=(\d+)", words), re.search(r"--gpu=(\S+)", words)
    gpu, gpus = other[1] if other else gpu, int(more[1]) if more else gpus
    return forecast(load_spec(path, overrides), named_place(gpu, gpus, None))


def test_none_is_more_than_another(tmp_path) -> None:
    path = tmp_path / "spec.yaml"
    data = spec_data(tmp_path, teacher__sharding="auto")
    path.write_text(yaml.safe_dump(data))
    plan = forecast(load_spec(path), named_place("a100-80", 1, None))
    ways = [set(words.split()) for words in plan["stages"]["distill"]["remedies"]]
    assert not any(a < b for a in ways for b in ways)
    assert sum("--gpus" in words for words in plan["stages"]["capture"]["remedies"]) == 1
