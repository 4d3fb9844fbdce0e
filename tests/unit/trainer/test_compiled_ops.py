"""Locks that a killed process has left do not stop the others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from trainer.compiled_ops import dropping_stale_locks, ops_folder, stale_locks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "py311_cpu" / "some_op"
    folder.mkdir(parents=True)
    return folder / "lock"


def take_and_die(lock: Path) -> None:
    """torch's own lock, by a process that is killed while it has it."""
    code = (
        "import os, signal, sys\n"
        "from torch.utils.file_baton import FileBaton\n"
        "assert FileBaton(sys.argv[1]).try_acquire()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(lock)])
    assert lock.exists()


def test_who_waits_for_a_killed_process_goes_on(lock: Path) -> None:
    take_and_die(lock)
    waiting = threading.Thread(target=FileBaton(str(lock)).wait, daemon=True)
    with dropping_stale_locks(look_s=0.1, stale_s=0.0):
        waiting.start()
        waiting.join(60)
    assert not waiting.is_alive() and not lock.exists()


def test_a_lock_that_is_held_stays(lock: Path) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    os.utime(lock, (1.0, 1.0))
    assert stale_locks(10.0) == []
    with dropping_stale_locks(look_s=0.05, stale_s=0.0):
        time.sleep(0.5)
    assert lock.exists()
    baton.release()


def test_a_fresh_lock_may_be_of_another_machine(lock: Path) -> None:
    lock.touch()
    assert stale_locks(60.0) == []
    os.utime(lock, (1.0, 1.0))
    assert stale_locks(60.0) == [lock]


def test_every_environment_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    for prefix in ("/one/.venv", "/another/.venv"):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
        monkeypatch.setattr(sys, "prefix", prefix)
        folders.add(ops_folder())
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(ops_folder())
    assert len(folders) == 2


def test_a_folder_that_is_asked_for_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert ops_folder() == tmp_path
