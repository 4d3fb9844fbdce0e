"""A run's log, wherever its driver runs."""

from __future__ import annotations

from pathlib import Path

from cluster.storage import open_store
from jobs.run.log import LogSegments, read_log


def test_on_remote_storage_a_log_is_published_in_pieces(tmp_path: Path) -> None:
    store = open_store("memory://logs-of-a-run")
    log = tmp_path / "0001.log"
    log.write_bytes(b"first\n")
    with LogSegments(store, 1, log) as pieces:
        pieces._publish()
        with log.open("ab") as file:
            file.write(b"second\n")
    assert b"".join(read_log(store, 1)) == b"first\nsecond\n"
    assert store.list("logs") == ["0001-00001.txt", "0001-00002.txt"]
    assert b"".join(read_log(store, 2)) == b""


def test_on_local_storage_it_is_a_file_and_followed_as_it_grows(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    log = tmp_path / "logs" / "0001.log"
    log.parent.mkdir()
    log.write_bytes(b"one\n")
    with LogSegments(store, 1, log):
        pass
    assert store.list("logs") == ["0001.log"]
    answers = iter([True, True, False])

    def going() -> bool:
        with log.open("ab") as file:
            file.write(b"more\n")
        return next(answers)

    assert b"".join(read_log(store, 1, going)) == b"one\nmore\nmore\nmore\n"
