"""JSON that every parser reads: no NaN, no Infinity, numpy values and paths as plain ones."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any


def plain(value: Any, *, lenient: bool = False) -> Any:
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


def encode(value: Any, *, indent: int | None = None, lenient: bool = False) -> bytes:
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
