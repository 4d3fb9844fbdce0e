"""The best weights of a training: chosen, kept, uploaded with a checkpoint, and found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.storage import Fenced, Store, open_store
from trainer.training.best_weights import BestWeights
from trainer.training.checkpoint import CheckpointFailed, CheckpointMisfit
from trainer.worker import Hooks, Worker


def make(store: Store, attempt: int = 1, **hooks: Any) -> BestWeights:
    device = torch.device("cpu")
    return BestWeights(store, Worker(0, 1, device, Hooks(attempt=attempt, **hooks)))


def offer(bests: BestWeights, step: int, value: float) -> bool:
    state = {"a": torch.full((2, 3), float(step)), "b": torch.ones(2, dtype=torch.bfloat16)}
    return bests.offer(step, value, {"select_ce": value}, lambda: state)


def checkpoint(bests: BestWeights, store: Store, step: int) -> None:
    """What the loop does around a checkpoint that keeps two."""
    bests.begin()
    record = {"state": {"best": bests.state()}}
    bests.complete()
    store.write_json(f"{step:08d}-0001.json", record)
    for old in [name for name in store.list() if name.endswith(".json")][:-2]:
        store.delete(old)
    bests.prune()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path).sub("training")


def step_of(bests: BestWeights) -> int:
    weights = bests.weights()
    assert weights is not None and weights["b"].dtype == torch.bfloat16
    return int(weights["a"][0, 0])


def test_the_lowest_is_kept_and_of_equals_the_later(store) -> None:
    bests = make(store)
    assert bests.state() is None and bests.weights() is None
    assert [offer(bests, step, value) for step, value in [(2, 3.0), (4, 2.0), (6, 2.5)]] == [
        True, True, False,
    ]  # fmt: skip
    assert step_of(bests) == 4 and bests.best is not None and bests.best.step == 4
    assert offer(bests, 8, 2.0) and step_of(bests) == 8
    assert not store.list()  # nothing is on storage before a checkpoint needs it


def test_the_last_weights_need_no_copy(store) -> None:
    bests = make(store)
    offer(bests, 2, 3.0)
    bests.offer(4, 1.0, {"select_ce": 1.0}, None)
    assert bests.best is not None and bests.best.step == 4 and bests.weights() is None


def test_a_resumed_training_has_the_best_of_its_checkpoint(store) -> None:
    bests = make(store)
    offer(bests, 2, 3.25)
    checkpoint(bests, store, 3)
    state = store.read_json("00000003-0001.json")["state"]["best"]
    offer(bests, 4, 1.0)  # and then it is killed
    again = make(store, attempt=2)
    again.restore(state)
    assert again.best is not None and again.best.step == 2 and step_of(again) == 2
    assert again.best.metrics == {"select_ce": 3.25}
    assert not offer(again, 4, 3.5) and step_of(again) == 2
    assert offer(again, 6, 3.0) and step_of(again) == 6
    checkpoint(again, store, 6)
    names = [name[:13] for name in store.list("best")]
    assert names == ["00000002-0001"] * 2 + ["00000006-0002"] * 2
    make(store).restore(None)  # of a checkpoint from before the first evaluation


def test_those_that_no_checkpoint_names_are_deleted(store) -> None:
    bests = make(store)
    for step in (2, 4, 6, 8):
        offer(bests, step, -step)
        checkpoint(bests, store, step)
        assert bests.best is not None and f"{bests.best.name}.json" in store.list("best")
    assert {name[:8] for name in store.list("best")} == {"00000006", "00000008"}
    store.write_bytes("best/00000007-0001/weights.safetensors", b"a kill left this")
    bests.prune()
    assert {name[:8] for name in store.list("best")} == {"00000006", "00000008"}


def test_what_is_uploaded_may_be_outdone_meanwhile(store) -> None:
    bests = make(store)
    offer(bests, 2, 3.0)
    assert bests.best is not None
    first = bests.best.name
    bests.begin()
    offer(bests, 4, 2.0)
    bests.complete()
    assert store.exists(f"best/{first}.json") and step_of(bests) == 4
    checkpoint(bests, store, 4)
    assert {name[:8] for name in store.list("best")} == {"00000004"}


def test_no_local_files_are_left(store, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bests = make(store)
    before = set(tmp_path.iterdir())
    offer(bests, 2, 3.0)
    bests.begin()
    offer(bests, 4, 2.0)
    assert len(set(tmp_path.iterdir()) - before - {tmp_path / "training"}) == 2
    bests.complete()
    bests.close()
    assert set(tmp_path.iterdir()) - {tmp_path / "training"} == before - {tmp_path / "training"}


def test_a_failed_upload_is_an_error_that_names_the_path(store) -> None:
    store.write_bytes("best", b"a file where the folder has to be")
    bests = make(store)
    offer(bests, 2, 3.0)
    bests.begin()
    with pytest.raises(CheckpointFailed, match="training/best: the best weights were not saved"):
        bests.complete()


def test_an_older_attempt_saves_nothing(store) -> None:
    def fence() -> None:
        raise Fenced("attempt 2 has taken over")

    bests = make(store, fence=fence)
    offer(bests, 2, 3.0)
    bests.begin()
    with pytest.raises(Fenced, match="attempt 2"):
        bests.complete()
    assert not [name for name in store.list("best") if name.endswith(".json")]


@pytest.mark.parametrize("harm", ["changed", "gone", "json"])
def test_damaged_weights_are_refused(store, harm) -> None:
    bests = make(store)
    offer(bests, 2, 3.0)
    checkpoint(bests, store, 3)
    assert bests.best is not None
    name = f"best/{bests.best.name}/weights.safetensors"
    if harm == "changed":
        data = bytearray(store.read_bytes(name))
        data[-1] ^= 1
        store.write_bytes(name, bytes(data))
    else:
        store.delete(name if harm == "gone" else f"best/{bests.best.name}.json")
    again = make(store, attempt=2)
    with pytest.raises(
        CheckpointMisfit, match=r"00000002-0001.*(step 2).*--redo distill"
    ) as caught:
        again.restore(bests.state())
        again.weights()
    assert "\n" not in str(caught.value)
