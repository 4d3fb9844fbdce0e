"""Strict JSON: written so that every parser reads it, and read from files that anyone may have
written.

Written without NaN and Infinity, with numpy values and paths as plain ones; read with a bound, and
every error on one line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plain(value: object, *, lenient: bool = False) -> Any:  # noqa: ANN401
    """Turn a value into what strict JSON can hold.

    NaN becomes null, an infinity the string "Infinity" or "-Infinity" (`float()` reads it back);
    numpy and torch values become numbers and lists, paths strings, sets sorted lists.
    Raises TypeError for anything else, or takes its `str` when lenient.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): plain(item, lenient=lenient) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, lenient=lenient) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item, lenient=lenient) for item in value), key=repr)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), lenient=lenient)
    if lenient:
        return str(value)
    raise TypeError(f"{type(value).__name__} {value!r} cannot be stored as JSON")


def encode(value: object, *, indent: int | None = None, lenient: bool = False) -> bytes:
    """UTF-8 bytes of strict JSON. Lone surrogates (of undecodable paths) become escapes."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(
        plain(value, lenient=lenient),
        indent=indent,
        separators=separators,
        ensure_ascii=False,
        allow_nan=False,
    )
    return text.encode("utf-8", "backslashreplace")


MIB = 1 << 20
SIZE_LIMIT = 16 * MIB  # a model of 1,000 layers is described in 1 MiB
SHOWN = 60  # characters of a foreign value that an error repeats


def broken(path: Path, text: str) -> ValueError:
    """The error for a file that is not what it should be, on one line whatever it holds."""
    return ValueError(" ".join(f"{path}: {text}".split()))


def shown(value: object) -> str:
    """A foreign value for an error: its repr, cut short."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deeply; an integer of 5,000 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def read_object(path: Path, limit: int = SIZE_LIMIT) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises ValueError (one line)."""
    if not path.is_file():
        raise broken(path, "this file is missing; copy the whole folder again")
    size = path.stat().st_size
    if size > limit:
        raise broken(path, f"it has {size} bytes, and may have {limit}; it is not what it seems")
    with path.open("rb") as file:
        return parse_object(file.read(limit), path)


def parse_object(data: bytes, path: Path, what: str = "the file") -> dict[str, Any]:
    """The JSON object in `data`, which came from `path`.

    NaN, infinities and repeated keys, which JSON leaves undefined, are refused like broken syntax:
    ValueError, one line.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise broken(path, f"{what} nests too deeply; copy the whole folder again") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ones
        raise broken(
            path, f"{what} is no valid JSON ({error}); copy the whole folder again"
        ) from None
    if not isinstance(value, dict):
        raise broken(path, f"{what} holds {shown(value)}; must be a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(again)} stands there twice")
    return made


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is out of range")
    return value
