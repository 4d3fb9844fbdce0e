"""Hub data sets as documents."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from trainer.corpus import files


def ranges(
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


def rows(
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


def fingerprint(key: str, repository: str, name: str | None, split: str) -> dict[str, str | int]:
    """Id, configuration, split, and the fingerprint `datasets` derives from the commit."""
    data = _load(key, repository, name, split)
    return {
        "source": repository,
        "name": name or "default",
        "split": split,
        "content": data._fingerprint,
    }


def _load(key: str, repository: str, name: str | None, split: str) -> Any:
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
def _cached(repository: str, name: str | None, split: str) -> Any:
    datasets = files.library()
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # its retries are not the user's concern; the error is
    try:
        return datasets.load_dataset(repository, name, split=split)
    finally:
        logger.setLevel(level)
