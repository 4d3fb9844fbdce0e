"""Requests to a run: stop, and save."""

from __future__ import annotations

import threading
from pathlib import Path

from cluster.storage import open_store
from jobs.live.requests import Asked, Requests, ask_save, ask_stop, asked
from jobs.live.stopping import StopWatch


def test_requests_are_of_one_attempt_and_made_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert asked(store, 1) == Asked()
    assert ask_stop(store, 1, by="me") and not ask_stop(store, 1)
    assert ask_save(store, 1, 1) and ask_save(store, 1, 2) and not ask_save(store, 1, 2)
    assert asked(store, 1) == Asked(stop=True, saves=2)
    assert asked(store, 2) == Asked()


def test_storage_is_asked_now_and_then(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    often, seldom = Requests(store, 3, every_s=0.0), Requests(store, 3, every_s=3600)
    assert not often.stop() and not seldom.stop()
    ask_stop(store, 3)
    assert often.stop() and often.saves() == 0
    assert not seldom.stop()


def test_a_request_sets_the_event_of_the_driver(tmp_path: Path) -> None:
    store, stop = open_store(tmp_path), threading.Event()
    with StopWatch(store, 4, stop):
        ask_stop(store, 4)
        assert stop.wait(10)
