"""Rows of conversations and completions: how they are read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.corpus.conversations import (
    Conversation,
    Pair,
    conversation,
    measure_row,
    prompt_completion,
)
from trainer.corpus.sources import RENDERING, fingerprint, read_documents, resolve
from trainer.spec.sections import SourceSpec

USER, ANSWER = {"role": "user", "content": "barn dest"}, {"role": "assistant", "content": "gest"}
MORE, LAST = {"role": "user", "content": "kirn"}, {"role": "assistant", "content": "birn\n\nlamp"}
TALK = [USER, ANSWER, MORE, LAST]


def row(*messages: dict[str, Any], prompt: int | None = None) -> Any:
    if prompt is None:
        return conversation("here", list(messages))
    return prompt_completion("here", list(messages[:prompt]), list(messages[prompt:]))


# What is refused, and what equal rows are.


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ("barn", "a text where a list of {role, content} should be; for plain texts set format"),
        (["barn"], "message 0 is a text; may be {role, content}"),
        ([{"from": "human", "value": "x"}], "message 0 has no role, it has from, value; may be"),
        ([{"role": "user", "content": None}], "message 0 has no content, it has role"),
        ([USER, {"role": "gpt", "content": "x"}], "message 1 has role 'gpt'; may be system, "),
        ([{"role": "user", "content": ["x"]}], "message 0 has a list as content; may be a text"),
        ([USER], "no turn of the assistant in messages, only user; remove the row"),
        ([{**USER, "name": "x"}, ANSWER], "message 0 has name, which is not rendered"),
    ],
)
def test_wrong_messages_are_named_in_one_line(messages, why) -> None:
    with pytest.raises(ValueError) as caught:
        conversation("data.train.0 (a.jsonl): row 3", messages)
    assert str(caught.value).startswith(f"data.train.0 (a.jsonl): row 3: {why}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "completion", "why"),
    [
        ("a", None, "prompt is a text and completion is null; both may be texts, or both lists"),
        ("a", [ANSWER], "prompt is a text and completion is a list"),
        (3, "b", "prompt is a int and completion is a text"),
        ([USER], [MORE], "no turn of the assistant in completion, only user"),
        ([USER, ANSWER], [], "no turn of the assistant in completion, only nothing"),
        ([USER], [{"role": "assistant"}], "completion message 0 has no content"),
    ],
)
def test_wrong_prompts_and_completions_are_named_in_one_line(prompt, completion, why) -> None:
    with pytest.raises(ValueError, match=f"^here: {why}"):
        prompt_completion("here", prompt, completion)


def test_null_keys_and_rows_are_passed_over() -> None:
    """Tables give every message the keys of all."""
    assert row({**USER, "tool_calls": None}, ANSWER) == row(USER, ANSWER)
    for nothing in (
        conversation("x", None),
        conversation("x", []),
        prompt_completion("x", None, []),
    ):
        assert nothing.is_empty
    assert row(USER, {"role": "assistant", "content": " "}).is_empty
    assert row(USER, ANSWER, MORE, {"role": "assistant", "content": ""}, prompt=3).is_empty
    assert Pair("a", " ").is_empty and not Pair("", "a").is_empty


def test_equal_rows_are_those_that_say_the_same() -> None:
    decomposed = {"role": "user", "content": " bärn dest".replace("ä", "a\u0308")}
    composed = {"role": "user", "content": "bärn dest "}
    assert measure_row(row(decomposed, ANSWER)) == measure_row(row(composed, ANSWER))
    others = [
        row(USER, ANSWER),
        row(USER, ANSWER, prompt=1),
        row({**USER, "role": "system"}, ANSWER),
        row(USER, ANSWER, MORE, LAST),
        Pair("barn dest", "gest"),
        Pair("barn destgest", ""),
    ]
    assert len({measure_row(other)[0] for other in others}) == len(others)
    assert measure_row(row(USER, ANSWER))[1:] == (14, 14)


# Sources.


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def read(source: Path, **settings: Any) -> list[Any]:
    shards = resolve(SourceSpec(source=str(source), **settings), 0)
    return [document for shard in shards for document in read_documents(shard)]


def test_rows_are_read_from_jsonl_and_parquet(tmp_path) -> None:
    rows = [{"messages": [USER, ANSWER], "id": 1}, {"messages": None}, {"messages": TALK}]
    found = read(jsonl(tmp_path / "a.jsonl", rows), format="messages")
    assert [len(one.messages) for one in found] == [2, 0, 4]
    assert found[2].messages[3] == ("assistant", "birn\n\nlamp")
    pq.write_table(pa.table({"talk": [[USER, ANSWER], TALK]}), tmp_path / "a.parquet")
    again = read(tmp_path / "a.parquet", format="messages", column="talk")
    assert [one.messages for one in again] == [found[0].messages, found[2].messages]
    texts = jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b", "more": 1}])
    [pair] = read(texts, format="prompt_completion")
    assert pair == Pair("a", "b", f"data.train.0 ({texts}): row 0")
    both = jsonl(tmp_path / "c.jsonl", [{"prompt": TALK[:1], "completion": TALK[1:2]}])
    [talk] = read(both, format="prompt_completion")
    assert isinstance(talk, Conversation) and talk.prompt == 1


def test_wrong_sources_are_told_before_work(tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}, {"messages": [USER]}])
    with pytest.raises(ValueError, match=r"data.train.0 \(.*a.jsonl\): row 1: no turn of the ass"):
        read(path, format="messages")
    with pytest.raises(ValueError, match="has no column 'talk'; set column: to one of messages"):
        read(path, format="messages", column="talk")
    with pytest.raises(ValueError, match="'prompt'; it needs prompt and completion, and has mess"):
        read(path, format="prompt_completion")
    with pytest.raises(ValueError, match="data.train.0.column: got 'x'; format: prompt_completion"):
        read(path, format="prompt_completion", column="x")


def test_the_identity_names_the_rendering_for_conversations_alone(tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": TALK, "text": "x"}])
    talks = fingerprint(SourceSpec(source=str(path), format="messages"))
    assert talks["rendering"] == RENDERING and talks["column"] == "messages"
    assert set(talks) - set(fingerprint(SourceSpec(source=str(path)))) == {"rendering"}
