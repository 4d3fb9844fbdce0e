"""Sources: what is read, in which order, and what is refused before work."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.corpus import files, python_docs, sources
from trainer.corpus.sources import Shard, fingerprint, read_documents, resolve
from trainer.spec.sections import SourceSpec


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    datasets = files.library()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sources._cached.cache_clear()


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(source: str | Path, **settings) -> list:
    shards = resolve(SourceSpec(source=str(source), **settings), 0)
    return [document for shard in shards for document in read_documents(shard)]


def error(source: str | Path, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        read(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reads_every_kind_of_file_in_the_order_of_names(tmp_path) -> None:
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.txt").write_text("ä")
    assert read(tmp_path / "*.txt") == ["ä", "one\n\ntwo\n"]  # a file is a document
    jsonl(tmp_path / "r.jsonl", [{"text": "x", "n": 1}, {"text": None}, {"n": 3}])
    assert read(tmp_path / "r.jsonl") == ["x", "", ""]  # rows keep their numbers
    (tmp_path / "l.json").write_text('[{"body": "p"}, {"body": "q"}]')
    assert read(tmp_path / "l.json", column="body") == ["p", "q"]
    pq.write_table(pa.table({"text": ["u", "v"], "n": [1, 2]}), tmp_path / "t.parquet")
    assert read(tmp_path / "*.parquet") == ["u", "v"]
    pq.write_table(pa.table({"input_ids": [[1, 2], None, [3]]}), tmp_path / "ids.parquet")
    assert read(tmp_path / "ids.parquet", format="input_ids") == [[1, 2], [], [3]]


def test_json_and_jsonl_are_one_kind_and_empty_files_are_passed_over(tmp_path) -> None:
    jsonl(tmp_path / "b.jsonl", [{"text": "2"}])
    (tmp_path / "a.json").write_text('[{"text": "1"}]')
    (tmp_path / "c.json").write_text("")
    assert read(tmp_path / "*.json*") == ["1", "2"]


def test_a_name_with_brackets_is_a_file_and_not_a_pattern(tmp_path) -> None:
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "a1.txt").write_text("other")
    assert read(tmp_path / "a[1].txt") == ["brackets"]


def test_paths_are_absolute_because_workers_start_elsewhere(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    [shard] = resolve(SourceSpec(source="*.txt"), 3)
    monkeypatch.chdir("/")
    shard = pickle.loads(pickle.dumps(shard))
    assert list(read_documents(shard)) == ["here"]
    assert shard.source == 3 and Path(shard.path).is_absolute()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_large_file_is_cut_into_fixed_row_ranges(tmp_path, monkeypatch, kind) -> None:
    texts = [f"document {number} " * 5 for number in range(50)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        jsonl(path, [{"text": text} for text in texts])
    else:
        pq.write_table(pa.table({"text": texts}), path)
    monkeypatch.setattr(files, "SHARD_BYTES", path.stat().st_size // 3)
    shards = resolve(SourceSpec(source=str(path)), 0)
    assert 3 <= len(shards) <= 4
    assert len({(shard.start, shard.stop) for shard in shards}) == len(shards)
    assert [text for shard in shards for text in read_documents(shard)] == texts
    assert list(read_documents(shards[1])) == texts[shards[1].start : shards[1].stop]


def test_cut_covers_all_rows() -> None:
    assert files.cut(10, 3) == [(0, 3), (3, 6), (6, 10)]
    assert files.cut(2, 5) == [(0, 1), (1, 2)]
    assert files.cut(0, 5) == []


def test_what_is_wrong_with_files_is_told_before_work(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.csv").write_text("a")
    jsonl(tmp_path / "c.jsonl", [{"body": "x", "n": 1}])
    assert "data.train.0.source: no file matches" in error(tmp_path / "no" / "*.txt")
    assert f"looked in {tmp_path}" in error(tmp_path / "no*" / "*.txt")
    assert "is a folder; give a glob such as" in error(tmp_path)
    assert ".csv files; may be .txt, .json, .jsonl, .parquet" in error(tmp_path / "*.csv")
    assert "mixes .jsonl, .txt" in error(f"{tmp_path}/[ac].*")
    assert "a URL; give a glob of local files" in error("s3://bucket/*.jsonl")
    missing = error(tmp_path / "c.jsonl")
    assert "no column 'text'; set column: to one of body, n" in missing
    assert "data.train.0.column" in missing
    assert "no column 'input_ids'" in error(tmp_path / "c.jsonl", format="input_ids")


def test_a_file_without_the_column_among_others_is_named(tmp_path, monkeypatch) -> None:
    jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    jsonl(tmp_path / "b.jsonl", [{"body": "x"}])
    assert "b.jsonl has no column 'text'" in error(tmp_path / "*.jsonl")
    monkeypatch.setattr(files, "CHECKED_FILES", 1)  # the rest is found out on reading
    assert "b.jsonl) has no column 'text'" in error(tmp_path / "*.jsonl")


def test_broken_files_and_wrong_values_are_one_line(tmp_path) -> None:
    (tmp_path / "bad.jsonl").write_text("no json\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    assert "bad.jsonl) cannot be read: JSON parse error" in error(tmp_path / "bad.jsonl")
    assert "bad.txt) cannot be read: 'utf-8' codec" in error(tmp_path / "bad.txt")
    jsonl(tmp_path / "n.jsonl", [{"text": 1, "input_ids": ["a"], "ids": [1]}])
    assert "row 0 of column 'text' is a int" in error(tmp_path / "n.jsonl")
    assert "not a list of integers" in error(tmp_path / "n.jsonl", format="input_ids")
    assert "set format: input_ids" in error(tmp_path / "n.jsonl", column="ids")


def plain(content: object) -> dict:
    user = {"role": "user", "content": "Hi"}
    return {"messages": [user, {"role": "assistant", "content": content}]}


def test_a_list_as_content_puts_no_quotes_around_the_texts_of_other_rows(tmp_path) -> None:
    """`datasets` keeps a column of mixed types as JSON, where the text x is "x"."""
    rows = [plain("x"), plain("42"), plain("null"), plain('"q"')]
    path = jsonl(tmp_path / "a.jsonl", [*rows, plain(["y"])])
    found = []
    with pytest.raises(ValueError, match="row 4: message 1 has a list as content"):
        found.extend(read_documents(resolve(SourceSpec(source=str(path), format="messages"), 0)[0]))
    documents = read(jsonl(tmp_path / "b.jsonl", rows), format="messages")
    assert [row.texts[1] for row in documents] == ["x", "42", "null", '"q"']


@pytest.mark.parametrize("cut", [False, True])
def test_keys_that_some_messages_have_as_null_are_passed_over(tmp_path, monkeypatch, cut) -> None:
    more = plain("y")
    more["messages"][1] |= {"tool_calls": None, "name": None}
    rows = [plain("x"), more, plain("z"), {"messages": None}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    if cut:
        monkeypatch.setattr(files, "SHARD_BYTES", path.stat().st_size // 3)
    found = read(path, format="messages")
    assert [row.texts for row in found] == [["Hi", "x"], ["Hi", "y"], ["Hi", "z"], []]


def test_prompts_may_be_texts_in_one_row_and_messages_in_another(tmp_path) -> None:
    user, bot = plain("x")["messages"]
    rows = [{"prompt": "12", "completion": " 3"}, {"prompt": [user], "completion": [bot]}]
    text, talk = read(jsonl(tmp_path / "a.jsonl", rows), format="prompt_completion")
    assert (text.prompt, text.completion) == ("12", " 3") and talk.texts == ["Hi", "x"]


def test_mixed_texts_are_read_as_they_are_far_behind_the_first_rows(tmp_path) -> None:
    texts = ["words " * 2000, "null"] * 1000  # `datasets` reads 10 MB at a time
    rows = [{"text": text, "meta": number or [1]} for number, text in enumerate(texts)]
    path = jsonl(tmp_path / "a.jsonl", [*rows, {"text": ["a list"]}])
    documents = read_documents(resolve(SourceSpec(source=str(path)), 0)[0])
    assert [next(documents) for _ in texts] == texts
    with pytest.raises(ValueError, match="row 2000 of column 'text' is a list"):
        next(documents)


def test_columns_that_datasets_keeps_as_json_are_decoded() -> None:
    datasets = files.library()
    rows = [plain("x")["messages"], plain(["y"])["messages"], None]
    data = datasets.Dataset.from_dict(
        {"messages": rows, "text": ["x", ["y"], None]}, on_mixed_types="use_json"
    )
    assert "Json" in str(data.features["text"]) and "Json" in str(data.features["messages"])
    assert list(files.column_values("here", data, ("messages",))) == rows
    assert list(files.column_values("here", data, ("text",), ("no",))) == [
        ("x", None), (["y"], None), (None, None)
    ]  # fmt: skip


def test_tools_beside_messages_are_refused(tmp_path) -> None:
    tools = [{"type": "function"}]
    path = jsonl(tmp_path / "a.jsonl", [plain("x"), {**plain("y"), "tools": None}])
    assert len(read(path, format="messages")) == 2
    path = jsonl(tmp_path / "b.jsonl", [plain("x"), {**plain("y"), "tools": tools}])
    assert "row 1 has tools beside its messages" in error(path, format="messages")


def test_lines_that_are_no_rows_are_named(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "x"}\r\n\n{"text": "y"}\n')
    assert read(tmp_path / "a.jsonl") == ["x", "y"]
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n3\n')
    assert "line 2 is no JSON object" in error(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text('{"text": "\\ud800"}\n')
    assert "c.jsonl) cannot be read: no UTF-8 in line 1" in error(tmp_path / "c.jsonl")


def test_a_file_that_this_node_does_not_have_is_named(tmp_path) -> None:
    shard = Shard(0, 0, "file", "text", "text", str(tmp_path / "gone.txt"))
    with pytest.raises(FileNotFoundError, match="gone.txt.*not on this node"):
        list(read_documents(shard))


def test_reading_is_silent(tmp_path, capfd) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x"}] * 10)
    pieces = [Shard(0, i, "file", "text", "text", str(path), i, i + 5) for i in (0, 5)]
    assert sum((list(read_documents(shard)) for shard in pieces), []) == ["x"] * 10
    (tmp_path / "bad.jsonl").write_text("no json\n")
    error(tmp_path / "bad.jsonl")
    assert capfd.readouterr() == ("", "")


def test_reading_local_files_calls_nobody(tmp_path, monkeypatch) -> None:
    """`datasets` counts loads on the hub, which takes seconds where there is no network."""
    asked: list[str] = []

    def lookup(host, *rest, **more):
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(files.library().config, "HF_HUB_OFFLINE", False)
    assert read(jsonl(tmp_path / "a.jsonl", [{"text": "x"}])) == ["x"]
    assert asked == []


def test_the_fingerprint_follows_content_and_not_place_or_weight(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    jsonl(tmp_path / "a" / "x.jsonl", [{"text": "one"}])
    before = fingerprint(SourceSpec(source=f"{tmp_path}/a/*.jsonl"))
    assert all(isinstance(value, (str, int)) for value in before.values())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint(SourceSpec(source=f"{tmp_path}/b/*.jsonl", weight=2.0)) == before
    jsonl(tmp_path / "b" / "x.jsonl", [{"text": "two"}])  # same size
    assert fingerprint(SourceSpec(source=f"{tmp_path}/b/*.jsonl")) != before
    assert fingerprint(SourceSpec(source=f"{tmp_path}/a/*.jsonl", column="n")) != before


def test_large_files_are_hashed_by_samples_of_start_and_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "WHOLE_HASH_BYTES", 1 << 20)
    path = tmp_path / "a.txt"
    content = bytearray(b"a" * (20 << 20))
    seen = set()
    for place in (None, 0, len(content) - 1):
        if place is not None:
            content[place] += 1
        path.write_bytes(content)
        seen.add(fingerprint(SourceSpec(source=str(path)))["content"])
    assert len(seen) == 3


# ---------------------------------------------------------------- the prose of CPython


def test_python_docs_are_prose_and_enough_of_it() -> None:
    source = SourceSpec(source="builtin:python-docs")
    shards = resolve(source, 1)
    assert len(shards) == 5
    texts = [text for shard in shards for text in read_documents(shard)]
    assert 3500 < len(texts) < 7000
    assert 1.5e6 < sum(map(len, texts)) < 4e6
    assert any(text.startswith('The "assert" statement') for text in texts)
    import json as module

    assert module.__doc__ is not None
    assert any(text.startswith(module.__doc__.split("\n")[0]) for text in texts)
    assert texts == [text for shard in resolve(source, 1) for text in read_documents(shard)]
    found = fingerprint(source)
    assert found["texts"] == len(texts)
    assert found == fingerprint(SourceSpec(source="builtin:python-docs", weight=3))


def test_python_docs_are_those_of_the_python_that_made_the_shards() -> None:
    [first, *_] = resolve(SourceSpec(source="builtin:python-docs"), 0)
    other = Shard(**{**first.__dict__, "fingerprint": "2.7.18"})
    with pytest.raises(RuntimeError, match="made with Python 2.7.18"):
        next(iter(read_documents(other)))


def test_docstrings_come_in_source_order_from_all_depths(tmp_path) -> None:
    long = "prose " * 20
    (tmp_path / "m.py").write_text(
        f'"""1 {long}"""\n'
        f'class A:\n    """2 {long}"""\n    def f(self):\n        """3 {long}"""\n'
        f"if True:\n    try:\n        pass\n    except E:\n        async def g():\n"
        f'            """4 {long}"""\n'
        f'def h():\n    """short"""\n    x = "{long}"\n    return "\\d"\n'
    )
    assert [text[0] for text in python_docs._docstrings(tmp_path / "m.py")] == list("1234")
    (tmp_path / "bad.py").write_text("def (:")
    assert list(python_docs._docstrings(tmp_path / "bad.py")) == []


def test_unknown_builtins_are_refused() -> None:
    assert "use builtin:python-docs" in error("builtin:shakespeare")
    assert "format: text" in error("builtin:python-docs", format="input_ids")
    assert "column: text" in error("builtin:python-docs", column="body")


# ---------------------------------------------------------------- hub data sets


def put_in_hub_cache(folder: Path, rows: list[dict], commit: str) -> None:
    """What `load_dataset("owner/docs")` leaves behind, made from a local file."""
    datasets = files.library()
    made = folder / "made"
    made.mkdir(parents=True)
    path = jsonl(made / "x.jsonl", rows)
    datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(made))
    [info] = made.glob("json/*/*/*/dataset_info.json")
    target = folder / "owner___docs" / "default" / "0.0.0" / commit
    target.mkdir(parents=True)
    content = json.loads(info.read_text())
    content.update(config_name="default", dataset_name="docs")
    content["splits"]["train"]["dataset_name"] = "docs"
    (target / "dataset_info.json").write_text(json.dumps(content))
    shutil.copy(info.parent / "json-train.arrow", target / "docs-train.arrow")
    shutil.rmtree(made)


@pytest.fixture
def offline(monkeypatch) -> None:
    monkeypatch.setattr(files.library().config, "HF_HUB_OFFLINE", True)


def test_a_hub_data_set_is_read_in_row_ranges(tmp_path, monkeypatch, offline) -> None:
    texts = [f"text {number}" for number in range(20)]
    rows = [{"text": text} for text in texts]
    put_in_hub_cache(tmp_path / "cache", rows, "a" * 40)
    monkeypatch.setattr(files, "SHARD_BYTES", 100)
    source = SourceSpec(source="owner/docs")
    shards = resolve(source, 0)
    assert len(shards) > 1 and {shard.kind for shard in shards} == {"hub"}
    assert [text for shard in shards for text in read_documents(shard)] == texts
    assert "one of text" in error("owner/docs", column="body")
    before = fingerprint(source)
    assert before == fingerprint(source) and before["source"] == "owner/docs"

    shutil.rmtree(tmp_path / "cache")
    put_in_hub_cache(tmp_path / "cache", rows, "b" * 40)  # another commit
    sources._cached.cache_clear()
    assert fingerprint(source) != before
    with pytest.raises(RuntimeError, match="another version of the data set"):
        list(read_documents(shards[0]))


def test_a_hub_data_set_of_prompts_is_read_from_two_columns(tmp_path, monkeypatch, offline) -> None:
    rows = [{"prompt": f"p{n}", "completion": f"c{n}", "more": n} for n in range(20)]
    put_in_hub_cache(tmp_path / "cache", rows, "a" * 40)
    monkeypatch.setattr(files, "SHARD_BYTES", 50)
    shards = resolve(SourceSpec(source="owner/docs", format="prompt_completion"), 0)
    assert len(shards) > 1
    found = [row for shard in shards for row in read_documents(shard)]
    assert [(row.prompt, row.completion) for row in found] == [
        (row["prompt"], row["completion"]) for row in rows
    ]
    assert found[-1].where == "data.train.0 (owner/docs): row 19"
    assert "no column 'messages'" in error("owner/docs", format="messages")


def test_a_hub_data_set_that_cannot_be_reached_names_the_local_way_out(
    offline, capfd, monkeypatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    message = error("nobody/nothing", name="en")
    assert pauses == []  # it is not tried again and again
    assert "data.train.0.source: cannot load data set 'nobody/nothing'" in message
    assert "Couldn't reach" in message and "local files such as" in message
    assert capfd.readouterr() == ("", "")
