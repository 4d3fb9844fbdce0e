"""Answers from a server that fails now and then: a loopback one, over real connections."""

from __future__ import annotations

import email.utils
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import open_store
from tests.fixtures.loopback import KEY, Server, serving
from trainer.responses import client
from trainer.responses.ask import ask_all
from trainer.responses.client import RateLimit, Stop
from trainer.responses.store import AnswerStore
from trainer.spec.responses import ResponsesSpec
from trainer.spec.sections import DataSpec, SourceSpec
from trainer.worker import Hooks, Stopped

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Pauses of milliseconds, a key in the environment, no proxy."""
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.002)
    monkeypatch.setenv("TEST_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def texts(folder: Path, count: int) -> DataSpec:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(count)))
    return DataSpec(train=[SourceSpec(source=str(path), format="prompt_completion")])


def spec_of(server: Server, origin: dict[str, Any] | None = None, **values: Any) -> ResponsesSpec:
    place = {"endpoint": server.url, "model": "big", "api_key_env": "TEST_API_KEY"}
    return ResponsesSpec.model_validate({"from": {**place, **(origin or {})}, **values})


def ask(
    server: Server, folder: Path, count: int = 8, hooks: Hooks | None = None, **how: Any
) -> Any:
    """Asks, and leaves the answers in a folder; (facts, answers by prompt)."""
    answers = AnswerStore(open_store(folder / "answers"))
    facts = ask_all(spec_of(server, **how), texts(folder, count), answers, hooks or Hooks())
    return facts, published(folder)


def published(folder: Path) -> dict[str, dict[str, Any]]:
    rows = {}
    for path in (folder / "answers" / "pieces").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert (row["prompt"], row["sample"]) not in rows
            rows[row["prompt"], row["sample"]] = row
    return {prompt: row for (prompt, _), row in rows.items()}


def everything_in(folder: Path) -> str:
    return "\n".join(p.read_text() for p in folder.rglob("*") if p.is_file())


def test_what_may_pass_is_tried_again(tmp_path):
    script = {
        "p0": [500],
        "p1": [(429, {"Retry-After": "0"})],
        "p2": ["drop"],
        "p3": ["garbage", 503, "drop", 502, "garbage"],
        "p4": ["length"],
    }
    with serving(script) as server:
        facts, rows = ask(server, tmp_path)
    assert {prompt: row["completion"] for prompt, row in rows.items()} == {
        f"p{n}": f"answer to p{n}" for n in range(8)
    }
    assert facts == {"counts": {"prompts": 8, "failed": 0}, "failed": []}
    assert sorted(server.asked) == sorted(
        [f"p{n}" for n in range(8)] + ["p0", "p1", "p2"] + ["p3"] * 5
    )
    assert [rows[f"p{n}"]["finish"] for n in (3, 4, 5)] == ["stop", "length", "stop"]
    assert rows["p0"]["tokens"] == 3
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert KEY not in everything_in(tmp_path)


def test_requests_say_what_the_spec_says(tmp_path):
    with serving() as server:
        ask(server, tmp_path, 2, samples=2, max_new_tokens=7, temperature=0.5, top_p=0.9, seed=4)
        seeds = [body.pop("seed") for body in server.bodies]
        assert server.bodies[0] | {"prompt": ""} == {
            "model": "big", "prompt": "", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9,
        }  # fmt: skip
        assert len(set(seeds)) == 4 and set(server.paths) == {"/v1/completions"}
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}]
    path.write_text(json.dumps({"messages": messages}))
    data = DataSpec(train=[SourceSpec(source=str(path), format="messages")])
    answers = AnswerStore(open_store(tmp_path / "chats"))
    with serving() as server:
        origin = {"endpoint": server.url + "/", "api_key_env": None}
        ask_all(spec_of(server, origin, temperature=0), data, answers, Hooks())
        assert server.bodies == [
            {"model": "big", "messages": messages, "max_tokens": 512, "temperature": 0.0}
        ]
        assert server.paths == ["/v1/chat/completions"] and server.keys == [None]
    manifest = answers.finish({}, 1)
    row = json.loads(answers.store.read_text(manifest["files"][0]["name"]))
    assert row["prompt"] == messages
    assert row["completion"] == [{"role": "assistant", "content": "answer to Hi"}]


def test_a_prompt_that_fails_for_good_is_counted(tmp_path):
    with serving({"p3": [400]}) as server:
        facts, rows = ask(server, tmp_path)
    assert "p3" not in rows and len(rows) == 7
    assert facts["counts"] == {"prompts": 8, "failed": 1}
    assert facts["failed"][0].startswith("HTTP 400: ") and "[key]" in facts["failed"][0]
    with serving() as server:  # a later start asks for it again, and for nothing else
        facts, rows = ask(server, tmp_path)
    assert server.asked == ["p3"] and len(rows) == 8 and facts["counts"]["failed"] == 0


@pytest.mark.parametrize("how", ["null", 500, 422])
def test_too_many_failures_stop_the_run_in_one_line(tmp_path, how):
    with (
        serving({f"p{n}": [how] * 9 for n in range(3)}) as server,
        pytest.raises(ValueError, match=r"2 of 8 answers failed for good") as caught,
    ):
        ask(server, tmp_path, origin={"concurrency": 1})
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)
    if how == 500:
        assert server.asked == ["p0"] * client.TRIES + ["p1"] * client.TRIES
        assert "(6 tries)" in str(caught.value)


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 302])
def test_a_server_that_refuses_stops_the_run_at_once(tmp_path, status):
    with (
        serving(always=(status, {"Location": "http://127.0.0.1:9/"})) as server,
        pytest.raises(ValueError, match=f"refuses: HTTP {status}") as caught,
    ):
        ask(server, tmp_path, 50, origin={"concurrency": 2})
    assert len(server.asked) <= 4
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)


def test_answers_that_were_paid_for_are_kept_and_never_asked_for_again(tmp_path):
    stop = threading.Event()

    def stop_after_some() -> bool:
        return len(server.asked) >= 10

    with serving() as server:
        with pytest.raises(Stopped):
            ask(
                server,
                tmp_path,
                40,
                Hooks(stop_requested=stop_after_some),
                origin={"concurrency": 3},
            )
        first = list(server.asked)
        assert 10 <= len(first) < 40 and not stop.is_set()
        assert sorted(published(tmp_path)) == sorted(first)
        told: list[dict[str, Any]] = []
        hooks = Hooks(emit=lambda event, **fields: told.append(fields))
        facts, rows = ask(server, tmp_path, 40, hooks)
        assert sorted(server.asked) == sorted({f"p{n}" for n in range(40)})
        ask(server, tmp_path, 40)
        assert len(server.asked) == 40
    assert len(rows) == 40 and facts["counts"]["prompts"] == 40
    assert told[-1]["done"] == told[-1]["total"] == 40 and told[0]["done"] >= len(first)


def test_a_stop_does_not_wait_for_pauses(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 600.0)
    with serving(always=500) as server, pytest.raises(Stopped):
        ask(server, tmp_path, 4, Hooks(stop_requested=lambda: len(server.asked) >= 4))


def test_a_stop_does_not_wait_for_a_slow_server(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.responses.ask.LAST_SECONDS", 0.5)
    monkeypatch.setattr("trainer.responses.ask.PROGRESS_SECONDS", 0.0)
    done = [0]
    hooks = Hooks(
        emit=lambda event, **fields: done.append(fields["done"]),
        stop_requested=lambda: done[-1] == 3 and len(server.asked) == 4,
    )
    with serving({"p3": ["slow"]}) as server:
        with pytest.raises(Stopped):
            ask(server, tmp_path, 4, hooks)
        assert server.now == 1  # it is still at work
        assert sorted(published(tmp_path)) == ["p0", "p1", "p2"]
        ask(server, tmp_path, 4)
        assert server.asked.count("p3") == 2 and len(published(tmp_path)) == 4


def test_concurrency_is_kept(tmp_path):
    with serving() as server:
        ask(server, tmp_path, 60, origin={"concurrency": 4})
    assert 1 <= server.most <= 4


def test_a_missing_key_is_said_without_asking(tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_API_KEY")
    with serving() as server, pytest.raises(ValueError, match="TEST_API_KEY is not set"):
        ask(server, tmp_path)
    assert server.asked == []


# Pauses and the rate, on a clock of their own.


class Clock:
    """Seconds that pass when somebody pauses."""

    def __init__(self) -> None:
        self.now = 100.0
        self.stopped = False

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> bool:
        self.now += seconds
        return self.stopped


def test_never_more_requests_in_a_minute_than_allowed():
    clock = Clock()
    limit = RateLimit(7, clock.pause, clock)
    sent = []
    for number in range(40):
        clock.now += 0.1 if number % 10 else 25.0  # some threads are late
        limit.wait()
        sent.append(clock.now)
    for start in sent:
        assert sum(start <= at < start + 60 - 1e-6 for at in sent) <= 7
    assert sent[-1] - sent[0] < 40 * 60 / 7 + 4 * 25  # and it is used


def test_a_pause_that_the_server_demands_holds_everybody():
    clock = Clock()
    limit = RateLimit(None, clock.pause, clock)
    limit.wait()
    assert clock.now == 100.0
    limit.hold(30)
    limit.wait()
    assert clock.now == 130.0
    clock.stopped = True
    limit.hold(1)
    with pytest.raises(Stop):
        limit.wait()


def test_retries_count_as_requests_and_heed_retry_after():
    clock = Clock()
    when = email.utils.formatdate(time.time() + 40, usegmt=True)
    script = {"p": [(429, {"Retry-After": "25"}), (503, {"Retry-After": when}), 500]}
    from trainer.responses.prompts import Prompt, prompt_key

    with serving(script) as server:
        spec = spec_of(server, {"requests_per_minute": 6})
        asking = client.Client(spec.origin, spec, KEY, clock.pause, clock)
        times = []
        wait = asking.limit.wait
        asking.limit.wait = lambda: (wait(), times.append(clock.now))  # type: ignore[method-assign]
        reply = asking.ask(Prompt(0, "p", prompt_key("p")), 0)
        asking.close()
    assert reply.text == "answer to p" and len(server.asked) == 4
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert gaps[0] == pytest.approx(25)
    assert 38 <= gaps[1] <= 41
    assert gaps[2] == pytest.approx(10)
    assert KEY not in repr(asking)
