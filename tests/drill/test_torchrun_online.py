"""Online distillation under torchrun, stopped and gone on with, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.storage import open_store, read_events
from tests.system.test_torchrun import launch, stopped, write_spec


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return write_spec(tmp_path)


def test_an_online_training_goes_on_with_fewer_ranks(spec) -> None:
    """The teacher beside the student, nothing captured of train, and one rank after two."""
    changes = [
        "name=online", "distill.mode=online", "distill.losses={jsd: 1, hidden: 0.1}",
        "distill.temperature=3", "distill.control=false", "distill.evaluate_steps=60",
        "distill.steps=120",
    ]  # fmt: skip
    store = open_store(spec.parent / "runs" / "online")
    out, error = stopped(launch(str(spec), *changes), store)
    assert "interrupted: distill stopped after step" in error, error
    process = launch(str(spec), *changes, ranks=1)
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    assert "which 2 ranks saved and 1 go on with" in out
    assert "distill: step 60, perplexity on select" in out
    events = read_events(store)
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 121))
    assert steps[-1]["jsd"] < steps[0]["jsd"] and steps[-1]["hidden"] < steps[0]["hidden"]
    (captured, *_) = [e["metrics"]["sequences"] for e in events if e["event"] == "capture_done"]
    assert captured <= 16  # of select and report alone
