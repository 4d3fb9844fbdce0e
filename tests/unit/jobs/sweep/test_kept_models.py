"""Which cells keep their models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Attempt, open_store
from jobs.sweep import fingerprints
from quant.spec import SweepSpec


def result(size: int, kl: list[float], **more: Any) -> dict[str, Any]:
    select = {"per_sequence": {"tokens": [10.0] * len(kl), "kl_to_reference": kl}}
    return {
        "status": "done",
        "model": "student",
        "bytes": size,
        "select": select,
        "decode_tokens_per_s": 5.0,
        "model_kept": True,
        **more,
    }


GOOD, BAD = [1.0, 1.1, 0.9, 1.0], [5.0, 5.2, 4.8, 5.1]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    """A run with the models of four cells."""
    found = Attempt.claim(open_store(tmp_path))
    for key in ("small", "large", "beaten", "tied", "slow"):
        found.write_json(f"cells/{key}/model/config.json", {})
    return found


def results() -> dict[str, dict[str, Any]]:
    return {
        "small": result(100, BAD),
        "large": result(200, GOOD),
        "beaten": result(300, BAD),
        "tied": result(210, [1.1, 1.0, 1.0, 0.9]),
        "slow": result(400, BAD, decode_tokens_per_s=None),
    }


def there(attempt: Attempt) -> set[str]:
    return {key for key in results() if attempt.store.exists(f"cells/{key}/model/config.json")}


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ("all", {"small", "large", "beaten", "tied", "slow"}),
        ("pareto", {"small", "large", "tied", "slow"}),
        ("none", {"slow"}),
    ],
)
def test_what_is_kept(attempt: Attempt, kept: Any, left: set[str]) -> None:
    """One without a speed is never dropped: it will be measured by the next run."""
    found = results()
    fingerprints.drop(SweepSpec(keep_models=kept), found, attempt)
    assert there(attempt) == left
    for key, each in found.items():
        assert each["model_kept"] == (key in left)
        if key not in left:
            assert attempt.store.read_json(f"cells/{key}/result.json")["model_kept"] is False


def test_what_went_is_made_again_when_it_is_wanted(attempt: Attempt) -> None:
    found, store = results(), attempt.store
    fingerprints.drop(SweepSpec(keep_models="none"), found, attempt)
    some = SweepSpec(keep_models="pareto")
    assert fingerprints.missing(some, found, store) == ["large", "small", "tied"]
    assert fingerprints.missing(SweepSpec(keep_models="none"), found, store) == []
    for key, each in found.items():
        assert fingerprints.complete(some, each, store, key)
        every = fingerprints.complete(SweepSpec(), each, store, key)
        assert every == (key == "slow"), "with all kept, one that is gone is made again"
    unmeasured = result(100, GOOD, decode_tokens_per_s=None)
    assert not fingerprints.complete(some, unmeasured, store, "gone")


def test_a_superseded_attempt_drops_nothing(attempt: Attempt) -> None:
    Attempt.claim(attempt.store)
    with pytest.raises(RuntimeError, match="superseded"):
        fingerprints.drop(SweepSpec(keep_models="none"), results(), attempt)
    assert len(there(attempt)) == 5
