"""Prompts, answers on storage, files of answers, sampling; truth from the rows themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.storage import open_store
from tests.fixtures.corpora import config_values
from trainer.checks import responses_faults
from trainer.corpus.sources import RENDERING
from trainer.responses import job as answers_job
from trainer.responses.answers_file import copy_file
from trainer.responses.generate import NextToken, Settings, TeacherWithAnswers, UnderWay, nucleus
from trainer.responses.job import Answers
from trainer.responses.make import answered, on_answers, open_answers
from trainer.responses.prompts import Prompt, prompt_key, read_prompts
from trainer.responses.store import (
    Answer,
    AnswerStore,
    corpus_of_answers,
    corpus_of_content,
    responses_identity,
)
from trainer.spec.responses import ResponsesSpec
from trainer.spec.rules import responses_fault
from trainer.spec.sections import DataSpec, SourceSpec, TeacherSpec, TokenizerSpec
from trainer.teacher.sampling import stream

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
ASK = {"role": "user", "content": "And now?"}


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_of(*sources: tuple[str, str]) -> DataSpec:
    return DataSpec(train=[SourceSpec(source=path, format=kind) for path, kind in sources])


# Prompts.


def test_prompts_end_with_the_last_turn_of_the_user(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"messages": [USER]},
        {"messages": [USER, BOT]},  # the same prompt
        {"messages": [system, USER, BOT, ASK, BOT]},
        {"messages": None},
        {"messages": []},
    ]
    found = read_prompts(data_of((jsonl(tmp_path / "a.jsonl", rows), "messages")))
    assert [prompt.value for prompt in found] == [[USER], [system, USER, BOT, ASK]]
    assert all(prompt.is_chat for prompt in found)


def test_prompts_of_pairs_need_no_completion_and_keep_their_source(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", [{"prompt": "One"}, {"prompt": ""}, {"prompt": "Two"}])
    second = jsonl(
        tmp_path / "b.jsonl", [{"prompt": "Two", "completion": "x"}, {"prompt": "Three"}]
    )
    third = jsonl(tmp_path / "c.jsonl", [{"prompt": [USER, BOT]}])
    kind = "prompt_completion"
    found = read_prompts(data_of((first, kind), (second, kind), (third, kind)))
    assert [(p.source, p.value) for p in found] == [
        (0, "One"), (0, "Two"), (1, "Three"), (2, [USER])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [BOT]}, "row 1 of column 'messages' has no message of the user"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "has role 'boss'"),
        ({"messages": [{"role": "user", "content": None}]}, "no content"),
    ],
)
def test_a_row_without_a_prompt_is_named(tmp_path, row, said):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [USER]}, row])
    with pytest.raises(ValueError, match=said) as caught:
        read_prompts(data_of((path, "messages")))
    assert "\n" not in str(caught.value) and "data.train.0" in str(caught.value)


def test_keys_are_of_the_content_alone():
    one = Prompt(
        0, [{"role": "user", "content": "Hi"}], prompt_key([{"role": "user", "content": "Hi"}])
    )
    assert one.key == prompt_key([{"content": "Hi", "role": "user"}])
    assert prompt_key("Hi") != prompt_key([USER]) != prompt_key([USER, BOT])
    assert len({one.answer_key(sample) for sample in range(50)}) == 50


# Answers on storage.


def answer(number: int, **changes: Any) -> Answer:
    values: dict[str, Any] = {
        "key": f"{number:032x}", "source": number % 2, "sample": 0, "prompt": f"p{number}",
        "completion": f" c{number}", "tokens": 2, "finish": "stop",
    }  # fmt: skip
    return Answer(**{**values, **changes})


def test_files_do_not_depend_on_who_answered_when(tmp_path):
    made = []
    for name, order in (("a", [[0, 1, 2], [3, 4, 5]]), ("b", [[5], [3, 0], [4, 1], [2, 5]])):
        store = AnswerStore(open_store(tmp_path / name))
        for worker, numbers in enumerate(order):
            store.publish([answer(number) for number in numbers], 1, worker)
        manifest = store.finish({"counts": {"prompts": 6}}, 2)
        assert manifest["counts"]["answers"] == 6 and manifest["counts"]["prompts"] == 6
        made.append(
            [(file["name"], store.store.read_bytes(file["name"])) for file in manifest["files"]]
        )
    assert made[0] == made[1]
    rows = [json.loads(line) for line in made[0][0][1].splitlines()]
    assert [row["prompt"] for row in rows] == ["p0", "p2", "p4"]


def test_empty_answers_and_cut_turns_are_left_out(tmp_path):
    store = AnswerStore(open_store(tmp_path))
    turn = [{"role": "assistant", "content": "Well, I"}]
    store.publish(
        [
            answer(0),
            answer(2, finish="length"),
            answer(4, completion=" "),
            answer(6, completion=turn, finish="length"),
            answer(8, completion=turn),
        ],
        1,
        0,
    )
    manifest = store.finish({}, 1)
    assert manifest["counts"] == {"answers": 5, "cut": 2, "empty": 1, "left_out": 2}
    kept = store.store.read_text(manifest["files"][0]["name"])
    assert [json.loads(line)["prompt"] for line in kept.splitlines()] == ["p0", "p2", "p8"]
    with pytest.raises(ValueError, match=r"data\.train\.1: no answer to learn from"):
        store.finish({}, 2)


def test_many_files_hold_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.responses.store.FILE_BYTES", 300)
    store = AnswerStore(open_store(tmp_path))
    store.publish([answer(2 * number) for number in range(20)], 1, 0)
    files = store.finish({}, 1)["files"]
    assert len(files) > 3
    lines = [line for file in files for line in store.store.read_text(file["name"]).splitlines()]
    assert [json.loads(line)["prompt"] for line in lines] == [f"p{2 * n}" for n in range(20)]


def test_a_broken_piece_is_named(tmp_path):
    store = AnswerStore(open_store(tmp_path))
    store.store.write_text("pieces/0001-0000-x.jsonl", '{"key": "a"}\n{"key"')
    with pytest.raises(ValueError, match="0001-0000-x.jsonl: byte 13: no JSON; delete the file"):
        store.keys()


def test_answers_on_remote_storage_become_documents():
    from trainer.corpus.prepare import serial
    from trainer.corpus.sources import read_documents, resolve

    root = open_store("memory://responses-unit")
    answers = open_answers(root, {"a": 1})
    answers.publish([answer(number) for number in range(6)], 1, 0)
    answers.finish({"rows": "prompt_completion"}, 2)
    data = DataSpec(
        train=[
            SourceSpec(source="x.jsonl", format="messages", weight=3),
            SourceSpec(source="y.jsonl"),
        ]
    )
    found = answered(data, answers)
    assert [(s.format, s.weight) for s in found.train] == [
        ("prompt_completion", 3),
        ("prompt_completion", 1),
    ]
    (shard,) = resolve(found.train[1], 1)
    elsewhere = type(shard)(**{**vars(shard), "path": "/not/here/" + Path(shard.path).name})
    (rows,) = on_answers(serial, answers)(lambda s: list(read_documents(s)), [(elsewhere,)])
    assert [(row.prompt, row.completion) for row in rows] == [
        (f"p{n}", f" c{n}") for n in (1, 3, 5)
    ]


# Files of answers.


def test_a_file_is_copied_as_it_is(tmp_path):
    rows = [{"messages": [USER, BOT], "id": 1}, {"messages": [USER, BOT, ASK, BOT], "id": 2}]
    spec = ResponsesSpec.model_validate({"from": {"file": jsonl(tmp_path / "a.jsonl", rows)}})
    answers = AnswerStore(open_store(tmp_path / "store"))
    answers.seal(copy_file(spec.origin, answers))
    manifest = answers.manifest()
    assert manifest["rows"] == "messages" and manifest["counts"] == {"answers": 2}
    text = answers.store.read_text(manifest["files"][0]["name"])
    assert [json.loads(line) for line in text.splitlines()] == rows
    (source,) = answered(DataSpec(train=[]), answers).train
    assert source.format == "messages" and source.weight == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "line 2: .*completion is null"),
        ('{"text": "a"}\n', "has rows with text; may be messages, or prompt and completion"),
        ('{"prompt": "a", "completion": "b"}\nnonsense\n', "line 2 is no JSON object"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "no turn of the assistant"),
        ('{"prompt": "a", "completion": ""}\n', "line 1: holds no answer"),
        ("\n", "is empty"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, said):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    spec = ResponsesSpec.model_validate({"from": {"file": str(path)}})
    with pytest.raises(ValueError, match=said) as caught:
        copy_file(spec.origin, AnswerStore(open_store(tmp_path / "store")))
    assert "\n" not in str(caught.value) and "responses.from.file" in str(caught.value)


# Identity and faults.


def endpoint(**more: Any) -> dict[str, Any]:
    return {"endpoint": "https://x.example/v1", "model": "m", **more}


def test_identity_is_what_decides_the_answers(tmp_path):
    data = data_of((jsonl(tmp_path / "a.jsonl", [{"prompt": "One"}]), "prompt_completion"))

    def of(data: Any = data, teacher: Any = None, **values: Any) -> dict[str, Any]:
        spec = ResponsesSpec.model_validate(values)
        return responses_identity(spec, data, teacher or {"weights": "w"}, {"tokenizer": "t"})

    assert of() == of()
    for other in (
        of(seed=1), of(temperature=0.5), of(samples=2), of(teacher={"weights": "v"}),
        of(**{"from": endpoint()}), of(max_new_tokens=9), of(top_p=0.9),
    ):  # fmt: skip
        assert other != of()
    fast = endpoint(concurrency=3, requests_per_minute=9, api_key_env="KEY")
    assert of(**{"from": fast}) == of(**{"from": endpoint()})
    assert of(**{"from": endpoint()}) == of(**{"from": endpoint()}, teacher={"weights": "v"})
    (tmp_path / "a.jsonl").write_text('{"prompt": "Two"}\n')
    assert of(data) != of(**{"from": endpoint()})
    corpus = corpus_of_answers(data, {"tokenizer": "t"}, of())
    assert corpus["responses.seed"] == 0 and corpus["data.sequence_length"] == 2048
    spec = ResponsesSpec()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2], "top_k": 5}')
    two = responses_identity(spec, data, {}, {}, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert responses_identity(spec, data, {}, {}, tmp_path) != two
    assert two["ends"] == "[1, 2]"
    given = ResponsesSpec.model_validate({"from": {"file": str(tmp_path / "a.jsonl")}})
    assert responses_identity(given, DataSpec(train=[]), {}, {})["rendering"] == RENDERING


def test_other_answers_to_the_same_prompts_are_another_corpus(tmp_path):
    asked, names = {"responses.seed": 0}, []
    for turn, number in enumerate((0, 0, 2)):
        store = AnswerStore(open_store(tmp_path / str(turn)))
        store.publish([answer(0, completion=f" answer {number}")], 1, 0)
        names.append(corpus_of_content(asked, store.finish({}, 1)))
    assert names[0] == names[1] != names[2] and names[0]["responses.seed"] == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"from": {"file": "a.jsonl"}, "samples": 2}, "responses.samples: got 2; is for answers"),
        ({"temperature": 0, "samples": 2}, "responses.samples: got 2; may be 1"),
        ({"temperature": 0, "top_p": 0.5}, "responses.top_p: got 0.5; may be 1"),
        ({"from": endpoint(endpoint="https://me:pw@x.example/v1")}, "has credentials in the URL"),
        ({"from": endpoint(endpoint="https://x.example/v1?a=b")}, "without ?"),
        ({"from": endpoint()}, None),
        ({"from": {"file": "a.jsonl"}}, None),
        ({}, None),
    ],
)
def test_faults_of_the_section(values, said):
    fault = responses_fault(ResponsesSpec.model_validate(values))
    assert (fault is None) if said is None else (said in fault and "pw" not in fault)


def test_faults_of_the_world(tmp_path):
    class Spec:
        data = data_of((jsonl(tmp_path / "a.jsonl", [{"prompt": "One"}]), "prompt_completion"))
        responses = ResponsesSpec.model_validate({"from": endpoint(api_key_env="NO_KEY")})

    assert responses_faults(Spec, {"NO_KEY": "secret"}) == []
    (fault,) = responses_faults(Spec, {"NO_KEY": " "})
    assert "responses.from.api_key_env: the environment variable NO_KEY is not set" in fault
    Spec.data = data_of((jsonl(tmp_path / "b.jsonl", [{"prompt": ""}]), "prompt_completion"))
    (fault,) = responses_faults(Spec, {"NO_KEY": "secret"})
    assert fault.startswith("data.train.0: ")
    Spec.responses = ResponsesSpec.model_validate({"from": {"file": str(tmp_path / "no.jsonl")}})
    (fault,) = responses_faults(Spec, {})
    assert fault.startswith("responses.from.file: no file")


def test_a_file_of_answers_is_read_to_its_end_before_work(tmp_path):
    class Spec:
        data = DataSpec(train=[])
        responses = ResponsesSpec()

    def faults(*rows: Any, tokenizer: Any = None) -> list[str]:
        path = jsonl(tmp_path / "a.jsonl", list(rows))
        Spec.responses = ResponsesSpec.model_validate({"from": {"file": path}})
        return responses_faults(Spec, {}, tokenizer=tokenizer)

    good = {"messages": [USER, BOT]}
    assert faults(good, good) == []
    (fault,) = faults(good, good, {"messages": [USER]})
    assert "a.jsonl: line 3: no turn of the assistant" in fault
    (fault,) = faults(good, {**good, "tools": [{"type": "function"}]})
    assert "line 2 has tools beside its messages" in fault
    pairs = [{"prompt": "a", "completion": "b"}] * 5
    (fault,) = faults(*pairs, tokenizer=TokenizerSpec(train=300))
    assert fault.startswith("responses.from.file: ") and "corpus too small" in fault
    assert "give more answers" in fault and "\n" not in fault


def test_answers_must_leave_room_for_a_prompt(tmp_path, monkeypatch):
    class Spec:
        teacher = TeacherSpec(model="m")
        data = data_of((jsonl(tmp_path / "a.jsonl", [{"prompt": "One"}]), "prompt_completion"))
        responses = ResponsesSpec(max_new_tokens=64)

    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "max_position_embeddings": 64})
    )
    monkeypatch.setattr("trainer.models.load.find_model", lambda *_: tmp_path)
    (fault,) = responses_faults(Spec)
    assert fault.startswith("responses.max_new_tokens: got 64; may be less than the teacher's 64")
    Spec.responses = ResponsesSpec(max_new_tokens=63)
    assert responses_faults(Spec) == []


def test_prompts_without_room_are_failures_and_may_not_be_many(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.responses.job.prompt_ids", lambda _, p: list(range(len(p.value))))
    spec = ResponsesSpec(max_new_tokens=10, samples=2)
    store = open_store(tmp_path)
    job = Answers(TeacherSpec(model="m"), spec, DataSpec(train=[]), 100, 1.0, store)
    prompts = [Prompt(0, "x" * size, prompt_key("x" * size)) for size in (5, 6, 7, 11)]
    items, long = answers_job.items_of(job, prompts, None, 20)
    assert long == 1 and len(items) == 6
    with pytest.raises(ValueError, match="2 of 4 prompts do not leave so much room"):
        answers_job.items_of(job, prompts, None, 16)


# Sampling.


def sampler(rows: int, vocab: int, *, seed: int = 0, **how: Any) -> NextToken:
    streams = torch.tensor(
        [stream(seed, bytes(8) + row.to_bytes(8, "big"), 0) for row in range(rows)]
    )
    return NextToken(streams, 3, vocab, how.get("temperature", 1.0), how.get("top_p", 1.0))


def chosen(scores: torch.Tensor) -> list[int]:
    assert (scores.isfinite().sum(dim=-1) == 1).all()
    return scores.argmax(dim=-1).tolist()


def test_ids_come_with_the_probabilities_of_the_model():
    """Frequencies over 40,000 rows against the softmax: a chi-square statistic."""
    rows, vocab = 40_000, 37
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 1.5
    scores = logits.repeat(rows, 1)
    for temperature in (0.7, 1.0):
        expected = (logits.double() / temperature).softmax(0).numpy() * rows
        drawn = chosen(sampler(rows, vocab, temperature=temperature)(torch.zeros(rows, 3), scores))
        counts = np.bincount(drawn, minlength=vocab)
        big = expected > 5
        statistic = ((counts - expected)[big] ** 2 / expected[big]).sum()
        assert statistic < big.sum() + 5 * np.sqrt(2 * big.sum())


def test_the_nucleus_is_the_smallest_set_that_has_the_mass():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    assert nucleus(p, 0.75).tolist() == [[0, 0.5, 0, 0.25], [pytest.approx(0.97), 0, 0, 0]]
    assert nucleus(p, 0.76)[0].tolist() == pytest.approx([0, 0.5, 0.15, 0.25])
    assert nucleus(p, 1e-9).count_nonzero(dim=-1).tolist() == [1, 1]
    assert torch.equal(nucleus(p, 1.0), p)
    drawn = chosen(sampler(500, 4, top_p=0.75)(torch.zeros(500, 3), p[:1].log().repeat(500, 1)))
    assert set(drawn) == {1, 3}


def test_numbers_are_of_the_row_and_the_position_alone():
    scores = torch.randn(8, 50, generator=torch.Generator().manual_seed(2))
    whole = sampler(8, 50)
    first, second = (chosen(whole(torch.zeros(8, 3 + n), scores)) for n in (0, 1))
    assert first != second
    part = NextToken(whole.streams[5:6], 9, 50, 1.0, 1.0)  # another width, another batch
    assert chosen(part(torch.zeros(1, 9), scores[5:6])) == first[5:6]
    assert chosen(sampler(8, 50, seed=1)(torch.zeros(8, 3), scores)) != first


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_no_token_are_never_chosen(temperature):
    scores = torch.zeros(200, 64)
    scores[:, 40:] = 50.0
    assert max(chosen(sampler(200, 40, temperature=temperature)(torch.zeros(200, 3), scores))) < 40


def test_messages_need_a_chat_template(tmp_path, monkeypatch):
    class Tokenizer:
        chat_template, name_or_path = None, "plain"

    class Spec:
        data = data_of(
            (jsonl(tmp_path / "a.jsonl", [{"prompt": "One"}]), "prompt_completion"),
            (jsonl(tmp_path / "b.jsonl", [{"prompt": [USER]}]), "prompt_completion"),
        )
        responses = ResponsesSpec()

    (fault,) = responses_faults(Spec, tokenizer=Tokenizer())
    assert fault.startswith("data.train.1: holds messages") and "tokenizer plain has none" in fault
    path = jsonl(tmp_path / "c.jsonl", [{"messages": [USER, BOT]}])
    Spec.responses = ResponsesSpec.model_validate({"from": {"file": path}})
    (fault,) = responses_faults(Spec, tokenizer=Tokenizer())
    assert fault.startswith("responses.from.file: holds messages")
    Tokenizer.chat_template = "x"
    monkeypatch.setattr("trainer.responses.answers_file.check_size", lambda data, tokenizer: None)
    assert responses_faults(Spec, tokenizer=Tokenizer()) == []


@pytest.mark.parametrize("stop_after", [None, 3])
def test_a_batch_under_way_is_told_and_can_be_stopped(stop_after: int | None) -> None:
    torch.manual_seed(0)
    values = {**config_values("llama"), "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).eval()
    settings = Settings(max_new_tokens=8, temperature=0.0, top_p=1.0, vocab=64, ends=(), pad=0)
    told: list[int] = []
    batch = UnderWay(told.append, lambda: len(told) + 1 == stop_after)
    ids = torch.randint(1, 64, (2, 5))
    streams = torch.zeros(2, 4, dtype=torch.int64)
    new = TeacherWithAnswers(model)(ids, torch.ones_like(ids), streams, settings, None, batch)
    count = stop_after or 8
    assert told == list(range(1, count + 1)) and new.shape == (2, count)
    assert batch.stopped == (stop_after is not None)
