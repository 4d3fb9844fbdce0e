"""Rows of JSON files as they stand there: an object a line, or a list of objects.

Not read by `datasets`, which types a column by its first rows: where types are mixed (a list as one
content among texts, keys that only some messages have) it keeps values as JSON, in which the text
x is "x" with its quotes, and from the second block of a file on it cannot be told any more.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

Row = dict[str, Any]
# Columns are looked for in so much of a file.
LOOKED_AT = 10 << 20


def is_list(path: str) -> bool:
    """Whether a file is one list, and not an object a line."""
    with open(path, "rb") as file:
        return file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def count(path: str) -> int:
    """How many rows a file of lines has."""
    return sum(1 for _ in _lines(path))


def columns(label: str, path: str, wanted: tuple[str, ...]) -> list[str]:
    """Keys of the rows, at least until the wanted ones have been seen or much has been read."""
    found: dict[str, None] = {}
    if is_list(path):
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


def rows(label: str, path: str, start: int, stop: int | None) -> Iterator[Row]:
    """Rows [start, stop) of a file; stop None: to its end. Raises ValueError, one line."""
    if is_list(path):
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


def _parsed(label: str, where: str, data: bytes) -> Any:
    try:
        found = json.loads(data.decode("utf-8"))
        if b"\\ud" in data or b"\\uD" in data:  # half a surrogate pair is no character
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{label} cannot be read: no UTF-8{where}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{label} cannot be read: JSON parse error{where}: {error}") from None
    return found


def _object(label: str, where: str, item: Any) -> Row:
    if not isinstance(item, dict):
        raise ValueError(f"{label} cannot be read: {where} is no JSON object")
    return item
