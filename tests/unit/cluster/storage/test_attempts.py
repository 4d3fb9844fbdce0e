"""Numbers of attempts are claimed once, and a newer attempt silences the older ones."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.storage import Attempt, Fenced, Store, open_store


def test_attempts_count_from_one_and_keep_their_info(
    store: Store, reopen: Callable[[], Store]
) -> None:
    assert Attempt.latest(store) == 0
    first = Attempt.claim(store, stage="distill", command=["run", "spec.yaml"])
    assert first.number == 1 and first.store == store
    second = Attempt.claim(reopen())
    assert second.number == 2 and Attempt.latest(store) == 2
    assert store.list("state/attempts") == ["0001.json", "0002.json"]
    said = store.read_json("state/attempts/0001.json")
    assert said["attempt"] == 1 and said["stage"] == "distill"
    assert said["command"] == ["run", "spec.yaml"] and said["pid"] > 0 and said["claimed_at"] > 0


def test_an_older_attempt_cannot_publish(store: Store, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w").write_bytes(b"old")
    old = Attempt.claim(store)
    old.fence()
    old.write_json("state/distill.json", {"from": 1})
    new = Attempt.claim(store)
    new.write_json("state/distill.json", {"from": 2})
    new.write_bytes("student/w", b"new")
    for publish in (
        old.fence,
        lambda: old.write_json("state/distill.json", {"from": 1}),
        lambda: old.write_bytes("student/w", b"old"),
        lambda: old.upload_folder(tmp_path / "model", "student"),
    ):
        with pytest.raises(Fenced, match=r"attempt 1 of .* superseded by attempt 2"):
            publish()
    assert store.read_json("state/distill.json") == {"from": 2}
    assert store.read_bytes("student/w") == b"new"
    new.upload_folder(tmp_path / "model", "copy")
    assert store.read_bytes("copy/w") == b"old"


@pytest.mark.parametrize("kind", ["local", "memory"])  # moto itself looks, then writes
def test_claimers_at_once_get_different_numbers(kind: str, tmp_path: Path) -> None:
    store = open_store(tmp_path if kind == "local" else f"memory://{tmp_path.name}-claims")
    numbers: list[int] = []
    start = threading.Barrier(8)

    def claim() -> None:
        start.wait()
        numbers.append(Attempt.claim(store).number)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))


def test_a_claim_taken_meanwhile_gives_the_next_number(store: Store, monkeypatch) -> None:
    """Two drivers that saw the same latest attempt: the slower one must not share its number."""
    Attempt.claim(store, who="fast")
    real, seen = Attempt.latest, []

    def late(of: Store) -> int:
        seen.append(real(of))
        return 0 if len(seen) == 1 else seen[-1]  # the first look was before the other's claim

    monkeypatch.setattr(Attempt, "latest", staticmethod(late))
    assert Attempt.claim(store, who="slow").number == 2
    assert store.read_json("state/attempts/0001.json")["who"] == "fast"


def test_numbers_are_compared_as_numbers(store: Store) -> None:
    for name in ("9999.json", "10000.json", "notes.txt", "x.json"):
        store.write_bytes(f"state/attempts/{name}", b"{}")
    assert Attempt.latest(store) == 10000  # "9999" sorts after "10000"
    assert Attempt.claim(store).number == 10001
    with pytest.raises(Fenced):
        Attempt(store, 9999).fence()


def test_attempts_travel_to_workers(tmp_path: Path) -> None:
    attempt = pickle.loads(pickle.dumps(Attempt.claim(open_store(tmp_path))))
    attempt.write_json("x.json", 1)
    assert attempt.number == 1 and open_store(tmp_path).read_json("x.json") == 1
