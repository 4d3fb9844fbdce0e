"""Local files as documents: globs of txt, json, jsonl or parquet.

Everything but JSON is read by Hugging Face `datasets`. Rows of JSON (an object a line, or a list
of objects) are read as they stand there: `datasets` types a column by its first rows: where types
are mixed (a list as one content among texts, keys that only some messages have) it keeps values as
JSON, in which the text x is "x" with its quotes, and from the second block of a file on it cannot
be told any more.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Columns are looked for in so much of a file.
LOOKED_AT = 10 << 20


def is_json_list(path: str) -> bool:
    """Whether a file is one list, and not an object a line."""
    with open(path, "rb") as file:
        return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def count_json(path: str) -> int:
    """How many rows a file of lines has."""
    return sum(1 for _ in _lines(path))


def json_columns(label: str, path: str, wanted: tuple[str, ...]) -> list[str]:
    """Keys of the rows, at least until the wanted ones have been seen or much has been read."""
    found: dict[str, None] = {}
    if is_json_list(path):
        for row in islice(_listed(label, path), 1000):
            found |= dict.fromkeys(row)
        return list(found)
    size = 0
    for number, line in _lines(path):
        found |= dict.fromkeys(_row(label, number, line))
        size += len(line)
        if size > LOOKED_AT or found.keys() >= set(wanted):
            break
    return list(found)


def json_rows(label: str, path: str, start: int, stop: int | None) -> Iterator[Row]:
    """Rows [start, stop) of a file; stop None: to its end. Raises ValueError, one line."""
    if is_json_list(path):
        yield from islice(_listed(label, path), start, stop)
        return
    for number, line in islice(_lines(path), start, stop):
        yield _row(label, number, line)


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of all lines that are not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.isspace() and text:
                yield number, text


def _listed(label: str, path: str) -> Iterator[Row]:
    with open(path, "rb") as file:
        found = _parsed(label, "", file.read().removeprefix(codecs.BOM_UTF8))
    for number, item in enumerate(found):
        yield _object(label, f"row {number}", {"text": item} if isinstance(item, str) else item)


def _row(label: str, number: int, line: bytes) -> Row:
    return _object(label, f"line {number}", _parsed(label, f" in line {number}", line))


def _parsed(label: str, where: str, data: bytes) -> Any:  # noqa: ANN401
    try:
        found = json.loads(data.decode("utf-8"))
        if b"\\ud" in data or b"\\uD" in data:  # half a surrogate pair is no character
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{label} cannot be read: no UTF-8{where}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{label} cannot be read: JSON parse error{where}: {error}") from None
    return found


def _object(label: str, where: str, item: object) -> Row:
    if not isinstance(item, dict):
        raise ValueError(f"{label} cannot be read: {where} is no JSON object")
    return item


LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SHARD_BYTES = 64 << 20  # a larger file is cut into row ranges of about this size
WHOLE_HASH_BYTES = 64 << 20  # a larger file is hashed by samples
CHECKED_FILES = 100  # columns of the first files are checked before work, of the rest on reading
BATCH_ROWS = 1024

Columns = tuple[str, ...]  # names, one or more


def is_local(source: str) -> bool:
    """True for a path or a glob, False for a hub id (`name` or `owner/name`)."""
    suffixed = Path(source).suffix.lower() in LOADERS
    rooted = source.startswith(("/", "./", "../", "~"))
    return (
        suffixed or rooted or glob.has_magic(source) or "://" in source or source.count("/") > 1
        or Path(source).exists()
    )  # fmt: skip


def find(key: str, source: str) -> list[str]:
    """Absolute paths of the files that a glob matches, sorted.

    Raises:
        ValueError: nothing matches, or the suffixes are mixed or unknown.
    """
    known = ", ".join(LOADERS)
    if "://" in source:
        raise ValueError(
            f"{key}.source: {source} is a URL; give a glob of local files ({known}), which all "
            "nodes share, or a hub data set id"
        )
    pattern = os.path.abspath(os.path.expanduser(source))
    if os.path.isfile(pattern):  # a name may hold [ ] without being a pattern
        found = [pattern]
    else:
        found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found and os.path.isdir(pattern):
        example = os.path.join(source, "*.jsonl")
        raise ValueError(f"{key}.source: {source} is a folder; give a glob such as {example}")
    if not found:
        raise ValueError(
            f"{key}.source: no file matches {source} (looked in {_fixed_folder(pattern)})"
        )
    suffixes = sorted({Path(path).suffix.lower() for path in found})
    unknown = [suffix for suffix in suffixes if suffix not in LOADERS]
    if unknown:
        raise ValueError(
            f"{key}.source: {source} matches {unknown[0] or 'suffixless'} files; may be {known}"
        )
    if len({LOADERS[suffix] for suffix in suffixes}) > 1:
        raise ValueError(
            f"{key}.source: {source} mixes {', '.join(suffixes)}; give each kind its own source"
        )
    return found


def pieces(key: str, source: str, wanted: Columns) -> list[tuple[str, int, int | None]]:
    """(path, first row, row after the last) per shard; (path, 0, None) is a whole file.

    Raises:
        ValueError: as `find`, and a wanted column that is not in a file.
    """
    result: list[tuple[str, int, int | None]] = []
    for number, path in enumerate(find(key, source)):
        size = os.path.getsize(path)
        if size == 0:
            continue
        if number < CHECKED_FILES:
            names = columns(f"{key} ({path})", path, wanted)
            check_columns(f"{key}.column: {path}", names, wanted)
        if size <= SHARD_BYTES or LOADERS[Path(path).suffix.lower()] == "text":
            result.append((path, 0, None))
            continue
        count = _count(f"{key} ({path})", path)
        result.extend((path, start, stop) for start, stop in cut(count, -(-size // SHARD_BYTES)))
    return result


def cut(rows: int, parts: int) -> list[tuple[int, int]]:
    """`rows` in at most `parts` contiguous ranges of nearly equal length, none empty."""
    parts = max(1, min(parts, rows))
    edges = [rows * part // parts for part in range(parts + 1)]
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]


def columns(label: str, path: str, wanted: Columns) -> list[str]:
    """Names of the columns of a file, from its first rows."""
    if _is_json(path):
        return json_columns(label, path, wanted)
    with reading(label):
        for table in _open(label, path, streaming=True).with_format("arrow").iter(batch_size=1):
            return list(table.column_names)
    return []


def check_columns(label: str, names: list[str], wanted: Columns) -> None:
    """Raise the one-line ValueError for a wanted column that is not among `names`."""
    absent = [column for column in wanted if column not in names]
    if names and absent:
        way_out = (
            f"set column: to one of {', '.join(names)}"
            if len(wanted) == 1
            else f"it needs {' and '.join(wanted)}, and has {', '.join(names)}"
        )
        raise ValueError(f"{label} has no column {absent[0]!r}; {way_out}")


def rows(
    label: str,
    path: str,
    wanted: Columns,
    start: int,
    stop: int | None,
    optional: Columns = (),
) -> Iterator[Any]:
    """The columns' values of rows [start, stop) of a file, in order; see `column_values`."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{label}: not on this node; put it on storage all nodes share")
    if _is_json(path) and (stop is None or not is_json_list(path)):
        yield from _json_values(label, path, wanted, start, stop, optional)
        return
    with reading(label):
        if stop is None:  # one pass over the file, nothing is written to datasets' cache
            data = _open(label, path, streaming=True)
        else:  # datasets' own Arrow cache gives random access to the rows of a large file
            data = _open(label, path, streaming=False).select(range(start, stop))
        yield from column_values(label, data, wanted, optional)


def column_values(label: str, data: Any, wanted: Columns, optional: Columns = ()) -> Iterator[Any]:  # noqa: ANN401
    """The values of a column of a (streaming) `datasets` data set, or tuples of those of several;
    other columns stay Arrow. optional: columns whose values are None where there is none."""
    features = library().Features
    for table in data.with_format("arrow").iter(batch_size=BATCH_ROWS):
        check_columns(label, list(table.column_names), wanted)
        values: list[list[Any]] = []
        for column in (*wanted, *optional):
            if column not in table.column_names:
                values.append([None] * len(table))
                continue
            found = table.select([column])
            feature = features.from_arrow_schema(found.schema)[column]
            plain = found.column(column).to_pylist()
            mixed = "Json(" in repr(feature)
            values.append([_decoded(feature, value) for value in plain] if mixed else plain)
        yield from values[0] if len(values) == 1 else zip(*values, strict=True)


def _json_values(
    label: str, path: str, wanted: Columns, start: int, stop: int | None, optional: Columns
) -> Iterator[Any]:
    names = (*wanted, *optional)
    missing, seen = set(wanted), dict[str, None]()
    for row in json_rows(label, path, start, stop):
        if missing:
            missing.difference_update(row)
            seen |= dict.fromkeys(row)
        yield row.get(names[0]) if len(names) == 1 else tuple(map(row.get, names))
    if missing:  # a range of a file may have nulls alone, which need not be written
        found = list(seen) if stop is None else json_columns(label, path, wanted)
        check_columns(label, found, wanted)


def _decoded(feature: Any, value: Any) -> Any:  # noqa: ANN401
    """A value of a column in which `datasets` has found mixed types and keeps some as JSON."""
    if value is None:
        return None
    if isinstance(feature, dict):
        return {key: _decoded(feature[key], item) for key, item in value.items()}
    if hasattr(feature, "feature"):  # its kinds of lists
        return [_decoded(feature.feature, item) for item in value]
    if type(feature).__name__ != "Json":
        return value
    found = json.loads(value)
    # A text that happens to be JSON is kept as it is: "42" among texts and lists is a text.
    return found if isinstance(found, (str, list, dict)) else value


def fingerprint(key: str, source: str) -> dict[str, str | int]:
    """Number of files, bytes, and one hash over every file's name, size and content."""
    total, digest = 0, hashlib.blake2b(digest_size=16)
    found = find(key, source)
    for path in found:
        size = os.path.getsize(path)
        total += size
        digest.update(f"{os.path.basename(path)}\0{size}\0".encode())
        digest.update(_content(path, size))
    return {"files": len(found), "bytes": total, "content": digest.hexdigest()}


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Turn what `datasets` raises for a broken file into a ValueError of one line that names it."""
    from datasets.exceptions import DatasetGenerationError
    from pyarrow.lib import ArrowException

    try:
        yield
    except (DatasetGenerationError, UnicodeDecodeError, ArrowException) as error:
        generated = isinstance(error, DatasetGenerationError)
        cause = (error.__cause__ or error) if generated else error
        message = " ".join(str(cause).split())[:200]
        raise ValueError(f"{label} cannot be read: {message}") from error


def library() -> Any:  # noqa: ANN401
    """The `datasets` module, without progress bars, log lines and calls home."""
    import logging

    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    # It counts loads on the hub, of local files too, and hangs for seconds where there is no net.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets


def _is_json(path: str) -> bool:
    return LOADERS[Path(path).suffix.lower()] == "json"


def _count(label: str, path: str) -> int:
    if _is_json(path) and not is_json_list(path):
        return count_json(path)
    return len(_open(label, path, streaming=False))


def _open(label: str, path: str, streaming: bool) -> Any:  # noqa: ANN401
    loader = LOADERS[Path(path).suffix.lower()]
    settings = {"sample_by": "document"} if loader == "text" else {}
    with reading(label):
        return library().load_dataset(
            loader,
            data_files=[glob.escape(path)],  # datasets takes every path for a pattern
            split="train",
            streaming=streaming,
            **settings,
        )


def _content(path: str, size: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        if size <= WHOLE_HASH_BYTES:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            for sample in range(16):
                file.seek((size - (1 << 20)) * sample // 15)
                digest.update(file.read(1 << 20))
    return digest.digest()


def _fixed_folder(pattern: str) -> str:
    """The part of a pattern before its first wildcard: where a user should look."""
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return folder
