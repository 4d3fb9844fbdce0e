"""Requests to a run: stop, and save."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.storage import open_store
from jobs.run import requests as module
from jobs.run.heartbeat import live_path
from jobs.run.requests import Asked, Requests, StopWatch, ask_kill, ask_save, ask_stop, asked


def test_requests_are_of_one_attempt_and_made_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert asked(store, 1) == Asked()
    assert ask_stop(store, 1, by="me") and not ask_stop(store, 1)
    assert ask_save(store, 1, 1) and ask_save(store, 1, 2) and not ask_save(store, 1, 2)
    assert asked(store, 1) == Asked(stop=True, saves=2)
    assert asked(store, 2) == Asked()


def test_storage_is_asked_now_and_then(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    often, seldom = Requests(store, 3, every=0.0), Requests(store, 3, every=3600)
    assert not often.stop() and not seldom.stop()
    ask_stop(store, 3)
    assert often.stop() and often.saves() == 0
    assert not seldom.stop()


def test_while_the_storage_is_away_the_last_answer_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    requests = Requests(store, 5, every=0.0)
    ask_save(store, 5, 1)
    assert requests.saves() == 1

    def away(*_: object) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(module, "asked", away)
    assert requests.saves() == 1 and not requests.stop()


def test_a_driver_that_is_to_end_at_once_says_so_and_ends(tmp_path: Path) -> None:
    """Whatever its main thread does."""
    code = (
        "import sys, threading, time\n"
        "from cluster.storage import open_store\n"
        "from jobs.run.heartbeat import Heartbeat\n"
        "from jobs.run.requests import StopWatch\n"
        "store = open_store(sys.argv[1])\n"
        "with Heartbeat(store, 1) as heartbeat:\n"
        "    with StopWatch(store, 1, threading.Event(), heartbeat.cut_off):\n"
        "        print('up', flush=True)\n"
        "        time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    store = open_store(tmp_path)
    ask_kill(store, 1)
    assert process.wait(timeout=120) == 130
    told = store.read_json(live_path(1))
    assert told["status"] == "stopped" and "by force" in told["error"]


def test_a_request_sets_the_event_of_the_driver(tmp_path: Path) -> None:
    store, stop = open_store(tmp_path), threading.Event()
    with StopWatch(store, 4, stop):
        ask_stop(store, 4)
        assert stop.wait(120)
