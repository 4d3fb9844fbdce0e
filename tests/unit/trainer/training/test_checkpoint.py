"""Checkpoints on storage: what is found, fetched and deleted, and saving in the background."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.storage import Attempt, Fenced, Store, open_store
from tests.fixtures.waiting import Clock, until
from trainer.training.checkpoint import (
    CheckpointFailed,
    CheckpointMisfit,
    fetch,
    find_latest,
    hash_file,
    newest,
    prune,
)
from trainer.training.checkpoint_names import name_of
from trainer.training.saver import Saver
from trainer.worker import Hooks, Worker

ROOT = Path(__file__).resolve().parents[4]
RECORD = {"step": 3, "world": 2, "zero_stage": 3, "files": {}, "state": {"tokens": 7}}


def alone(**hooks: Any) -> Worker:
    return Worker(0, 1, torch.device("cpu"), Hooks(attempt=1, **hooks))


def put(store: Store, *names: str) -> None:
    for name in names:
        store.write_bytes(f"{name}/state/a.pt", b"x")
        store.write_json(f"{name}.json", {**RECORD, "step": int(name[:8])})


# What is there.


def test_the_newest_is_the_one_of_the_highest_step_then_attempt(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert find_latest(store) is None
    put(store, "00000002-0009", "00000010-0001", "00000010-0002")
    store.write_bytes("00000011-0002/state/a.pt", b"x")  # its JSON never came
    store.write_json("done/metrics.json", {})
    store.write_json("inputs.json", {})
    found = find_latest(store)
    assert found is not None
    assert (found.folder, found.step, found.world) == ("00000010-0002", 10, 2)
    assert found.state == {"tokens": 7}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "must hold files, state, step, world, zero_stage"),
        (json.dumps({**RECORD, "more": 1}), "must hold"),
        (json.dumps({"step": 3}), "must hold"),
    ],
)
def test_a_broken_json_is_told_by_name_and_never_passed_over(
    tmp_path: Path, text: str, what: str
) -> None:
    store = open_store(tmp_path)
    put(store, "00000002-0001")
    store.write_text("00000003-0001.json", text)
    for look in (find_latest, lambda store: newest(store, alone())):
        with pytest.raises(CheckpointMisfit) as error:
            look(store)
        said = str(error.value)
        path = tmp_path / "00000003-0001.json"
        assert said.startswith(str(path)) and what in said and "\n" not in said
        assert said.endswith(f"delete {path} to continue from the checkpoint before it")


def test_old_ones_go_and_what_kills_have_left(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    put(store, "00000001-0001", "00000002-0001", "00000003-0001")
    store.write_bytes("00000004-0001/state/a.pt", b"x")
    store.write_json("done/metrics.json", {})
    store.write_json("inputs.json", {})
    prune(store, 2)
    kept = ["00000002-0001", "00000003-0001"]
    others = ["done", "inputs.json"]
    assert store.list() == sorted([*kept, *(f"{name}.json" for name in kept), *others])
    prune(store, 0)
    assert store.list() == others


def test_names_sort_by_step_then_by_attempt() -> None:
    names = [name_of(*of) for of in ((9, 2, "ff"), (10, 1, "00"), (10, 2, "ff"), (11, 1, "00"))]
    assert names == sorted(names)


def test_only_files_that_are_whole_are_fetched(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    put(store, "00000003-0001")
    digest = hash_file(tmp_path / "store" / "00000003-0001" / "state" / "a.pt")
    names = ["state/a.pt"]
    record = {**RECORD, "files": {"state/a.pt": digest, "state/b.pt": digest}}
    store.write_json("00000003-0001.json", record)
    found = find_latest(store)
    assert found is not None
    assert fetch(store, found, names, tmp_path / "whole") is None
    assert (tmp_path / "whole" / "state" / "a.pt").read_bytes() == b"x"

    folder = str(tmp_path / "store" / "00000003-0001")
    way_out = f"delete {folder}.json to continue from the checkpoint before it"
    fault = fetch(store, found, [*names, "state/b.pt"], tmp_path / "missing")
    assert fault == f"{folder}/state/b.pt: missing; {way_out}"
    store.write_bytes("00000003-0001/state/a.pt", b"y")
    fault = fetch(store, found, names, tmp_path / "damaged")
    assert fault == f"{folder}/state/a.pt: damaged: its hash differs; {way_out}"
    assert not (tmp_path / "damaged" / "state" / "a.pt").exists()
    assert store.exists("00000003-0001/state/a.pt")


# Saving. What DeepSpeed writes is in tests/drill/test_resume.py.


class Engine:
    """Writes what an engine writes, so far as names go."""

    module = torch.nn.Linear(1, 1)

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        (Path(folder) / "zero_to_fp32.py").write_text("")
        (Path(folder) / tag / "mp_rank_00_model_states.pt").write_bytes(b"model")
        (Path(folder) / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"state")


class Gated(Store):
    """A folder to which nothing gets through before the gate opens, and nothing after a fault."""

    def __init__(self, store: Store, fault: Exception | None = None) -> None:
        super().__init__(store._backend, store._prefix)
        self.gate, self.fault = threading.Event(), fault

    def upload_folder(self, local_dir: Any, p: str) -> None:
        assert self.gate.wait(60)
        if self.fault is not None:
            raise self.fault
        super().upload_folder(local_dir, p)


@pytest.fixture(autouse=True)
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where local files go for the time being."""
    folder = tmp_path / "local"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_checkpoint_is_there_once_it_is_completed(tmp_path: Path, local: Path) -> None:
    store = Gated(open_store(tmp_path / "store"))
    saver = Saver(store, alone(), keep=1)
    put(store, "00000001-0001")
    assert not saver.busy
    saver.begin(Engine(), 5, 2, {"tokens": 9})
    assert saver.busy and not saver.done_here() and list(local.iterdir())
    with pytest.raises(RuntimeError, match="under way"):
        saver.begin(Engine(), 6, 2, {})
    store.gate.set()
    until(saver.done_here)
    latest = find_latest(store)
    assert latest is not None and latest.step == 1
    saved = saver.complete()
    assert saved.step == 5 and saved.upload_s > 0 and saved.held_s > 0
    assert not saver.busy and not saver.done_here() and not list(local.iterdir())
    found = find_latest(store)
    assert found is not None
    assert (found.step, found.world, found.zero_stage, found.state) == (5, 1, 2, {"tokens": 9})
    assert sorted(found.files) == [
        "state/mp_rank_00_model_states.pt", "state/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ]  # fmt: skip
    assert found.folder.startswith("00000005-0001-")
    assert store.list() == [found.folder, f"{found.folder}.json"]
    assert fetch(store, found, found.files, tmp_path / "again") is None


def test_complete_waits_for_the_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("trainer.training.saver.time", clock)
    store = Gated(open_store(tmp_path / "store"))
    saver = Saver(store, alone(), keep=1)
    saver.begin(Engine(), 5, 2, {})
    looks = clock.looks["MainThread"]

    def open_gate() -> None:
        until(lambda: clock.looks["MainThread"] > looks)  # complete() is there
        clock.now += 7
        store.gate.set()

    threading.Thread(target=open_gate).start()
    assert saver.complete().held_s == 7
    assert find_latest(store) is not None


def test_a_group_that_starts_again_writes_where_no_other_does(tmp_path: Path) -> None:
    """Ranks of a lost node went on uploading into the folder of those that replaced them."""
    store = Gated(open_store(tmp_path / "store"))
    lost, again = (Saver(store, alone(), keep=2) for _ in range(2))
    lost.begin(Engine(), 5, 2, {})
    again.begin(Engine(), 5, 2, {})
    store.gate.set()
    for saver in (lost, again):
        until(saver.done_here)
    assert len(store.list()) == 2
    again.complete()
    found = find_latest(store)
    assert found is not None and store.list() == [found.folder, f"{found.folder}.json"]
    assert fetch(store, found, found.files, tmp_path / "again") is None


def test_what_cannot_be_deleted_fails_no_checkpoint(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    put(store, "00000001-0001")
    saver = Saver(store, alone(), keep=1)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no right to delete")

    store.delete = refuse  # type: ignore[method-assign]
    saver.begin(Engine(), 5, 2, {})
    assert saver.complete().step == 5


def test_a_checkpoint_on_remote_storage_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    store = open_store("memory://checkpoint-copies")
    saver = Saver(store, alone(), keep=1)
    saver.begin(Engine(), 5, 2, {})
    saver.complete()
    found = find_latest(store)
    assert found is not None and fetch(store, found, found.files, tmp_path / "here") is None
    (model,) = (tmp_path / "here").rglob("mp_rank_*.pt")
    assert model.read_bytes() == b"model" and not model.is_symlink()
    assert not (tmp_path / "cache").exists()
    store.delete(f"{found.folder}/state/{model.name}")
    fault = fetch(store, found, found.files, tmp_path / "gone")
    assert fault is not None and "missing" in fault


def test_a_failed_upload_is_an_error_and_leaves_the_checkpoint_before(
    tmp_path: Path, local: Path
) -> None:
    store = Gated(open_store(tmp_path / "store"), OSError("no space\nleft"))
    put(store, "00000001-0001")
    saver = Saver(store, alone(), keep=1)
    saver.begin(Engine(), 5, 2, {})
    store.gate.set()
    with pytest.raises(CheckpointFailed) as error:
        saver.complete()
    assert re.fullmatch(
        f"{tmp_path / 'store' / '00000005-0001'}-[0-9a-f]+: the checkpoint was not saved: rank 0 "
        "could not upload its files: OSError: no space left",
        str(error.value),
    )
    assert not saver.busy and not list(local.iterdir())
    latest = find_latest(store)
    assert latest is not None and latest.step == 1


@pytest.mark.parametrize("when", ["before the upload", "before the JSON"])
def test_an_attempt_that_was_superseded_completes_nothing(tmp_path: Path, when: str) -> None:
    store = Gated(open_store(tmp_path / "store"))
    run = open_store(tmp_path / "run")
    attempt = Attempt.claim(run)
    saver = Saver(store, alone(fence=attempt.fence), keep=1)
    saver.begin(Engine(), 5, 2, {})
    if when == "before the JSON":
        store.gate.set()
        until(saver.done_here)
    Attempt.claim(run)
    store.gate.set()
    with pytest.raises(Fenced, match="superseded by attempt 2"):
        saver.complete()
    assert find_latest(store) is None


def test_what_is_given_up_leaves_nothing_on_this_machine(tmp_path: Path, local: Path) -> None:
    store = Gated(open_store(tmp_path / "store"))
    saver = Saver(store, alone(), keep=1)
    saver.begin(Engine(), 5, 2, {})
    saver.close()
    assert not saver.busy and not list(local.iterdir())
    store.gate.set()
    assert find_latest(store) is None
    saver.close()


def test_folders_that_killed_processes_left_are_removed_by_the_next(local: Path) -> None:
    from trainer.training.checkpoint import Scratch

    ours = Scratch()
    code = (
        "import os, sys; from trainer.training.checkpoint import Scratch; print(Scratch().path); "
    )
    code += "sys.stdout.flush(); os.kill(os.getpid(), 9)"
    killed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "TMPDIR": str(local), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    left, foreign = Path(killed.stdout.strip()), local / "another"
    foreign.mkdir()
    assert killed.returncode == -9 and left.parent == local and left.is_dir()
    Scratch().close()
    assert left.is_dir()  # it might be one that is not locked yet
    for path in (ours.path, left, foreign):
        os.utime(path, (0, 0))
    Scratch().close()
    assert not left.exists() and ours.path.is_dir() and foreign.is_dir()
    ours.close()
