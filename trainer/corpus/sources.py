"""Where documents come from: a `SourceSpec` becomes shards, a shard becomes documents.

Shards are fixed by the data alone: one per local file, a large file in row ranges; a hub data set
in row ranges; the prose of CPython in five. So whoever maps a function over them, with however
many tasks, gets the same result. Everything but the built-in prose and JSON is read
by Hugging Face `datasets`.

A .txt file is one document (`sample_by="document"`); in the other formats a row is a document:
a text, token ids, or a row of which the assistant's words are learnt
(`trainer.corpus.conversations`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from trainer.corpus import files, python_docs
from trainer.corpus.conversations import COMPLETION, PROMPT, Row, conversation, prompt_completion
from trainer.spec.sections import DataSpec, SourceSpec


def hub_ranges(
    key: str, repository: str, name: str | None, split: str, wanted: files.Columns
) -> tuple[list[tuple[int, int]], str]:
    """Row ranges of about 64 MB of the columns, and the fingerprint of the data set.

    Raises:
        ValueError: the data set, its configuration or its split cannot be had, or no such column.
    """
    data = _load(key, repository, name, split)
    files.check_columns(f"{key}.column: {repository}", data.column_names, wanted)
    size = sum(data.data.table.column(column).nbytes for column in wanted)
    return files.cut(len(data), -(-size // files.SHARD_BYTES)), data._fingerprint


def hub_rows(
    label: str,
    repository: str,
    name: str | None,
    split: str,
    wanted: files.Columns,
    start: int,
    stop: int,
    expected: str,
    optional: files.Columns = (),
) -> Iterator[Any]:
    """The columns' values of rows [start, stop); see `files.column_values`.

    Raises:
        RuntimeError: the data set on this node is another version than `expected`.
    """
    data = _load(label, repository, name, split)
    if data._fingerprint != expected:
        raise RuntimeError(
            f"{label}: this node has another version of the data set than the driver; "
            "it changed on the hub, or an old copy is in this node's cache"
        )
    yield from files.column_values(label, data.select(range(start, stop)), wanted, optional)


def hub_fingerprint(
    key: str, repository: str, name: str | None, split: str
) -> dict[str, str | int]:
    """Id, configuration, split, and the fingerprint `datasets` derives from the commit."""
    data = _load(key, repository, name, split)
    return {
        "source": repository,
        "name": name or "default",
        "split": split,
        "content": data._fingerprint,
    }


def _load(key: str, repository: str, name: str | None, split: str) -> Any:  # noqa: ANN401
    try:
        return _cached(repository, name, split)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{key}.source: cannot load data set {repository!r} (name {name}, split {split}): "
            f"{reason}; tried files, the Hugging Face hub and its local cache; check the id, or "
            "download the data and give a glob of local files such as ./data/*.parquet"
        ) from error


@lru_cache(maxsize=4)  # a worker process reads several shards of one data set
def _cached(repository: str, name: str | None, split: str) -> Any:  # noqa: ANN401
    datasets = files.library()
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # its retries are not the user's concern; the error is
    try:
        return datasets.load_dataset(repository, name, split=split)
    finally:
        logger.setLevel(level)


BUILTIN = "builtin:python-docs"
TOOLS = "tools"  # the column of what the assistant of a conversation may call
WHOLE = ("messages", "prompt_completion")  # formats whose rows are `trainer.corpus.conversations`
RENDERING = 2  # raised when rows with messages, or prompts, become other tokens or labels

Document = str | list[int] | Row


@dataclass(frozen=True)
class Shard:
    """A fixed piece of one source, small enough for one task; picklable.

    `source` is the index in `data.train`, `number` counts the shards of that source. `path` is an
    absolute file or a hub id. `start` and `stop` are rows (files of the standard library for the
    built-in prose); `stop` None means the whole file. `fingerprint` is what the data must still be
    when the shard is read.
    """

    source: int
    number: int
    kind: Literal["file", "hub", "python-docs"]
    format: Literal["text", "input_ids", "messages", "prompt_completion"]
    column: str
    path: str
    start: int = 0
    stop: int | None = None
    name: str | None = None
    split: str = "train"
    fingerprint: str = ""

    @property
    def label(self) -> str:
        """How an error names this shard."""
        return f"data.train.{self.source} ({self.path})"

    @property
    def columns(self) -> files.Columns:
        """The columns that are read."""
        return _columns(self.format, self.column)


def resolve(source: SourceSpec, index: int) -> list[Shard]:
    """The shards of `data.train[index]`, in a fixed order.

    Raises:
        ValueError: no such file, a kind of file that is not known, a column that is not there, a
            hub data set that cannot be reached; one line that says how to mend it.
    """
    key = f"data.train.{index}"
    column = source.column or source.format
    columns = _columns(source.format, column)
    if source.format == "prompt_completion" and source.column is not None:
        raise ValueError(
            f"{key}.column: got {source.column!r}; format: prompt_completion reads the columns "
            f"{PROMPT} and {COMPLETION}: remove column"
        )
    common: dict[str, Any] = {"source": index, "format": source.format, "column": column}
    if source.source.startswith("builtin:"):
        if source.source != BUILTIN:
            raise ValueError(f"{key}.source: no built-in corpus {source.source!r}; use {BUILTIN}")
        if source.format != "text" or source.column not in (None, "text"):
            raise ValueError(f"{key}: {BUILTIN} has format: text and column: text only")
        return [
            Shard(**common, number=number, kind="python-docs", path=BUILTIN,
                  start=start, stop=stop, fingerprint=python_docs.version())
            for number, (start, stop) in enumerate(python_docs.ranges())
        ]  # fmt: skip
    if files.is_local(source.source):
        pieces = files.pieces(key, source.source, columns)
        return [
            Shard(**common, number=number, kind="file", path=path, start=start, stop=stop)
            for number, (path, start, stop) in enumerate(pieces)
        ]
    ranges, fingerprint = hub_ranges(key, source.source, source.name, source.split, columns)
    return [
        Shard(**common, number=number, kind="hub", path=source.source, start=start, stop=stop,
              name=source.name, split=source.split, fingerprint=fingerprint)
        for number, (start, stop) in enumerate(ranges)
    ]  # fmt: skip


def resolve_all(data: DataSpec) -> list[Shard]:
    """The shards of all sources, in order. Raises ValueError as `resolve`."""
    measured = data.min_chars > 1 or data.max_chars is not None
    if measured and all(source.format == "input_ids" for source in data.train):
        raise ValueError(
            "data.min_chars and data.max_chars count characters of text, and every source has "
            "format: input_ids; remove them"
        )
    return [shard for index, source in enumerate(data.train) for shard in resolve(source, index)]


def read_documents(shard: Shard) -> Iterator[Document]:
    """Every row of the shard in order: its text, its token ids, or what is said in it; a null is
    "", [] or a row that is empty.

    Raises:
        ValueError: the file is broken, the column is missing, or a row holds something else.
        RuntimeError: the data is not what it was when the shards were made.
    """
    if shard.kind == "python-docs":
        if shard.fingerprint != python_docs.version():
            raise RuntimeError(
                f"{shard.label}: made with Python {shard.fingerprint}, this worker runs "
                f"{python_docs.version()}; use one Python on all nodes"
            )
        assert shard.stop is not None
        yield from python_docs.documents(shard.start, shard.stop)
        return
    check = _CHECKS[shard.format]
    if shard.format not in WHOLE:
        for row, value in enumerate(read_columns(shard), start=shard.start):
            yield check(shard, row, value)
        return
    for row, (*values, tools) in enumerate(read_columns(shard, (TOOLS,)), start=shard.start):
        refuse_tools(f"{shard.label}: row {row}", tools)
        yield check(shard, row, values[0] if len(values) == 1 else values)


def read_columns(shard: Shard, optional: files.Columns = ()) -> Iterator[Any]:
    """The values of the shard's columns, row by row, as `files.column_values`."""
    if shard.kind == "hub":
        assert shard.stop is not None
        return hub_rows(
            shard.label, shard.path, shard.name, shard.split, shard.columns,
            shard.start, shard.stop, shard.fingerprint, optional,
        )  # fmt: skip
    return files.rows(shard.label, shard.path, shard.columns, shard.start, shard.stop, optional)


def refuse_tools(where: str, tools: object) -> None:
    """Raises ValueError, one line, for a conversation with tools: they would not be rendered."""
    if tools:
        raise ValueError(
            f"{where} has {TOOLS} beside its messages, which are not rendered; remove the row, or "
            f"the column {TOOLS}"
        )


def fingerprint(source: SourceSpec, index: int = 0) -> dict[str, str | int]:
    """What identifies the documents of a source, flat: equal exactly when the documents are.

    Local files: names, sizes, and a blake2b hash of the contents. Hub: the id and the fingerprint
    that `datasets` derives from its commit. Built-in: the Python version and a hash of the text.
    The weight is not in it: it changes how often a sequence is read, not the sequence.
    """
    key = f"data.train.{index}"
    shared: dict[str, str | int] = {
        "format": source.format,
        "column": source.column or source.format,
    }
    if source.format in WHOLE:
        shared["rendering"] = RENDERING
    if source.source.startswith("builtin:"):
        return {**shared, "source": source.source, **python_docs.fingerprint()}
    if files.is_local(source.source):
        return {**shared, **files.fingerprint(key, source.source)}
    return {**shared, **hub_fingerprint(key, source.source, source.name, source.split)}


def _columns(format: str, column: str) -> files.Columns:
    return (PROMPT, COMPLETION) if format == "prompt_completion" else (column,)


def _text(shard: Shard, row: int, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        hint = "; set format: input_ids for token ids" if isinstance(value, list) else ""
        raise ValueError(
            f"{shard.label}: row {row} of column {shard.column!r} is a {type(value).__name__}, "
            f"format: text needs strings{hint}"
        )
    return value


def _ids(shard: Shard, row: int, value: object) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise ValueError(
            f"{shard.label}: row {row} of column {shard.column!r} is not a list of integers, "
            "format: input_ids needs token ids; set format: text for strings"
        )
    return value


def _conversation(shard: Shard, row: int, value: object) -> Row:
    return conversation(f"{shard.label}: row {row}", value)


def _prompt_completion(shard: Shard, row: int, value: Any) -> Row:  # noqa: ANN401
    return prompt_completion(f"{shard.label}: row {row}", *value)


_CHECKS: dict[str, Callable[[Shard, int, Any], Document]] = {
    "text": _text,
    "input_ids": _ids,
    "messages": _conversation,
    "prompt_completion": _prompt_completion,
}
