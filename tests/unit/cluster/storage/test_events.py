"""Events of many writers arrive exactly once, in order, and a replayed step counts once."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import cluster
from cluster.storage import EventTail, EventWriter, Store, open_store, read_events
from cluster.storage.events import flush_interval
from tests.fixtures.waiting import until

ROOT = Path(cluster.__file__).parents[2]
NEVER_S = 25.0  # a timer that does not fire within a test


def publish(store: Store, attempt: int, *events: dict) -> None:
    with EventWriter(store, attempt, first_interval_s=NEVER_S) as writer:
        for event in events:
            fields = dict(event)
            writer.emit(fields.pop("event"), **fields)


def steps(*numbers: int, stage: str = "distill", **more: object) -> list[dict]:
    return [{"event": "step", "stage": stage, "step": n, **more} for n in numbers]


def test_events_come_back_in_order(store: Store, reopen: Callable[[], Store]) -> None:
    with EventWriter(store, 1, first_interval_s=NEVER_S) as writer:
        writer.emit("stage_start", stage="capture")
        writer.emit("progress", stage="capture", done=1, total=2, unit="sequences")
        writer.flush()
        writer.flush()  # nothing new: no object
        writer.emit("stage_done", stage="capture", seconds=1.5, metrics={"text": "a\nb\u2028c"})
    assert store.list("events") == ["0001-000001.jsonl", "0001-000002.jsonl"]
    events = read_events(reopen())
    assert [e["event"] for e in events] == ["stage_start", "progress", "stage_done"]
    assert events[2]["metrics"] == {"text": "a\nb\u2028c"} and events[1]["done"] == 1
    assert all(e["attempt"] == 1 and abs(e["t"] - time.time()) < 60 for e in events)
    assert read_events(store.sub("another")) == [] == EventTail(store.sub("another")).poll()


def test_every_line_is_strict_json(store: Store) -> None:
    class Odd:
        def __str__(self) -> str:
            return "odd"

    with EventWriter(store, 1, first_interval_s=NEVER_S) as writer:
        writer.emit("step", loss=float("nan"), ce=np.float32("inf"), norm=np.float64("-inf"))
        writer.emit("stage_failed", error="bad \udcff\x00", nested={"x": [np.nan, Odd()]})
    data = store.read_bytes("events/0001-000001.jsonl")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    first, second = (json.loads(x, parse_constant=refuse) for x in data.decode().splitlines())
    assert (first["loss"], first["ce"], first["norm"]) == (None, "Infinity", "-Infinity")
    assert second["error"] == "bad \udcff\x00" and second["nested"] == {"x": [None, "odd"]}


def test_an_event_is_taken_as_it_was_when_emitted(tmp_path: Path) -> None:
    store, metrics = open_store(tmp_path), {"loss": 1}
    with EventWriter(store, 1, first_interval_s=NEVER_S) as writer:
        writer.emit("training_done", metrics=metrics)
        metrics["loss"] = 2
    assert read_events(store)[0]["metrics"] == {"loss": 1}


def test_reserved_fields_and_closed_writers_are_refused(tmp_path: Path) -> None:
    writer = EventWriter(open_store(tmp_path), 1)
    with pytest.raises(ValueError, match="'attempt'"):
        writer.emit("step", attempt=3)
    writer.close()
    writer.close()  # again does nothing
    with pytest.raises(RuntimeError, match="closed"):
        writer.emit("step")
    with pytest.raises(ValueError, match="first_interval_s is 0"):
        EventWriter(open_store(tmp_path), 1, first_interval_s=0)


def test_two_writers_of_one_attempt_lose_nothing(store: Store, reopen: Callable[[], Store]) -> None:
    """A driver and a worker write under the same attempt; a tail sees all of both, once."""
    tail, polled = EventTail(reopen()), []
    one = EventWriter(store, 3, first_interval_s=NEVER_S)
    two = EventWriter(reopen(), 3, first_interval_s=NEVER_S)
    for n in range(6):
        (one if n % 3 else two).emit("cell_start", key=f"even-{n}")
        (two if n % 3 else one).emit("cell_done", key=f"odd-{n}")
        one.flush()
        if n == 2:
            polled += tail.poll()
        two.flush()
    one.close()
    two.close()
    polled += tail.poll()
    assert tail.poll() == []
    expected = {f"{kind}-{n}" for n in range(6) for kind in ("even", "odd")}
    assert sorted(e["key"] for e in polled) == sorted(expected)
    assert sorted(e["key"] for e in read_events(store)) == sorted(expected)
    assert len(store.list("events")) == 12


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    tail, polled, done = EventTail(store), [], threading.Event()

    def follow() -> None:
        while not done.is_set():
            polled.extend(tail.poll())

    def write(who: int) -> None:
        with EventWriter(store, 1, first_interval_s=0.005) as writer:
            for n in range(60):
                writer.emit("progress", who=who, n=n)
                time.sleep(0.001)

    threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    reader = threading.Thread(target=follow)
    for thread in [reader, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    polled.extend(tail.poll())
    for events in (polled, read_events(store)):
        assert len(events) == 240
        for who in range(4):  # each writer's own events stay in order
            assert [e["n"] for e in events if e["who"] == who] == list(range(60))


def test_a_tail_sees_a_late_segment_of_an_older_attempt(store: Store) -> None:
    tail = EventTail(store)
    zombie = EventWriter(store, 1, first_interval_s=NEVER_S)
    zombie.emit("run_start", name="a", spec={})
    zombie.flush()
    publish(store, 2, {"event": "resume", "stage": "distill", "step": 5, "pids": [1]})
    assert [e["attempt"] for e in tail.poll()] == [1, 2]
    zombie.emit("step", stage="distill", step=6)
    zombie.close()
    assert [(e["attempt"], e["event"]) for e in tail.poll()] == [(1, "step")]


def test_a_poll_without_news_reads_no_segment(store: Store, monkeypatch) -> None:
    publish(store, 1, *steps(1, 2))
    tail = EventTail(store)
    assert len(tail.poll()) == 2
    monkeypatch.setattr(store, "read_bytes", lambda p: pytest.fail(f"read {p}"))
    assert tail.poll() == []


def test_a_poll_that_failed_is_repeated_by_the_next(store: Store, monkeypatch) -> None:
    publish(store, 1, *steps(1))
    publish(store, 1, *steps(2))
    tail, real = EventTail(store), store.read_bytes

    def broken(p: str) -> bytes:
        if "000002" in p:
            raise ConnectionError("network")
        return real(p)

    monkeypatch.setattr(store, "read_bytes", broken)
    with pytest.raises(ConnectionError):
        tail.poll()
    monkeypatch.undo()
    assert [e["step"] for e in tail.poll()] == [1, 2]


def test_replayed_steps_count_once_and_the_last_wins(store: Store) -> None:
    """After a kill at step 5, training resumes from the checkpoint of step 3."""
    publish(store, 1, *steps(1, 2, 3, loss=1.0))
    publish(store, 1, {"event": "checkpoint", "stage": "distill", "step": 3, "seconds": 1.0})
    publish(store, 1, *steps(4, 5, loss=1.0), *steps(4, stage="control", loss=9.0))
    resume = {"event": "resume", "stage": "distill", "step": 3, "pids": [1]}
    publish(store, 2, resume, *steps(4, 5, 6, loss=2.0))
    publish(store, 2, *steps(6, loss=3.0))  # a restart of workers within one attempt
    events = read_events(store)
    distill = [e for e in events if e["event"] == "step" and e["stage"] == "distill"]
    assert [(e["step"], e["loss"]) for e in distill] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
        (6, 3.0),
    ]
    assert [e["loss"] for e in events if e.get("stage") == "control"] == [9.0]
    assert [e["event"] for e in events if e["event"] != "step"] == ["checkpoint", "resume"]
    assert [e["attempt"] for e in events] == sorted(e["attempt"] for e in events)


def test_segments_sort_as_numbers(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for name in ("10000-000001", "9999-1000000", "9999-999999"):
        line = json.dumps({"t": 0, "attempt": 1, "event": name})
        store.write_text(f"events/{name}.jsonl", line + "\n")
    store.write_text("events/README", "no segment")
    names = [e["event"] for e in read_events(store)]
    assert names == ["9999-999999", "9999-1000000", "10000-000001"]
    with EventWriter(store, 9999) as writer:
        writer.emit("x")
    assert "9999-000001.jsonl" in store.list("events")


def test_a_broken_segment_is_named(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write_text("events/0001-000001.jsonl", '{"event": "x"}\n{"eve')
    with pytest.raises(ValueError, match=r"events/0001-000001\.jsonl holds a line"):
        read_events(store)


def test_the_interval_grows_with_age() -> None:
    assert flush_interval(0, 1.0) == 1.0 and flush_interval(100, 1.0) == 1.0
    assert flush_interval(1000, 1.0) == 10.0 and flush_interval(1e6, 1.0) == 30.0
    age, objects = 0.0, 0
    while age < 10 * 3600:
        age += flush_interval(age, 1.0)
        objects += 1
    assert objects < 2000


def test_the_timer_publishes_without_a_flush(store: Store) -> None:
    with EventWriter(store, 1, first_interval_s=0.02) as writer:
        writer.emit("run_start", name="x", spec={})
        until(lambda: read_events(store))
        assert [e["event"] for e in read_events(store)] == ["run_start"]


def test_storage_that_fails_for_a_while_loses_nothing(tmp_path: Path, caplog) -> None:
    store, target = open_store(tmp_path), tmp_path / "events"
    target.write_text("in the way")  # the folder cannot be made
    with caplog.at_level(logging.WARNING), EventWriter(store, 1, first_interval_s=0.01) as writer:
        for n in range(5):
            writer.emit("step", stage="distill", step=n)
            time.sleep(0.02)
        with pytest.raises(OSError):
            writer.flush()
        target.unlink()
        writer.emit("step", stage="distill", step=5)
    assert [e["step"] for e in read_events(store)] == list(range(6))
    assert "kept for a later try" in caplog.text


def test_events_stay_in_order_over_a_failed_publish(tmp_path: Path, monkeypatch) -> None:
    store = open_store(tmp_path)
    writer = EventWriter(store, 1, first_interval_s=NEVER_S)

    def fail(*_: object) -> bool:
        writer.emit("second")  # while the first is on its way
        raise ConnectionError

    writer.emit("first")
    with monkeypatch.context() as patch:
        patch.setattr(store, "create", fail)
        with pytest.raises(ConnectionError):
            writer.flush()
    writer.close()
    assert [e["event"] for e in read_events(store)] == ["first", "second"]


def test_a_failing_close_does_not_hide_the_error_of_the_body(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("in the way")

    def body(error: Exception | None) -> None:
        with EventWriter(open_store(tmp_path), 1, first_interval_s=NEVER_S) as writer:
            writer.emit("x")
            if error:
                raise error

    with pytest.raises(ZeroDivisionError):
        body(ZeroDivisionError())
    with pytest.raises(OSError):
        body(None)


EMIT_FOREVER = """
import sys
from cluster.storage import EventWriter, open_store
writer, n = EventWriter(open_store(sys.argv[1]), int(sys.argv[2]), 0.005), 0
print("go", flush=True)
while True:
    n += 1
    writer.emit("step", stage="distill", step=n, text="x" * 500)
    if n % 40 == 0:
        writer.flush()
"""


def test_killed_writers_leave_whole_segments_without_gaps(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    store = open_store(tmp_path)
    for attempt in (1, 2):
        process = subprocess.Popen(
            [sys.executable, "-c", EMIT_FOREVER, str(tmp_path), str(attempt)], env=environment
        )
        while len([n for n in store.list("events") if n.startswith(f"000{attempt}")]) < 20:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    events = EventTail(store).poll()  # raises on half a line
    for attempt in (1, 2):
        mine = [e["step"] for e in events if e["attempt"] == attempt]
        assert mine == list(range(1, len(mine) + 1)) and len(mine) > 100
    kept = [e["step"] for e in read_events(store)]
    assert sorted(kept) == list(range(1, len(kept) + 1))
