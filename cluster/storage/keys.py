"""Names of objects: paths below a store, and fingerprints of what an object is made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

# Unfinished local writes and probes carry this prefix; no listing ever shows them.
HIDDEN = ".stillhouse-"


def is_hidden(name: str) -> bool:
    """Whether a file name belongs to the storage itself (a write under way, a probe)."""
    return name.startswith(HIDDEN)


def join(*parts: str) -> str:
    """Join relative paths into one key such as `cells/hqq-4b-g64/result.json`; "" is the root.

    Raises ValueError for a path that leaves the store (absolute, "..") or is reserved.
    """
    pieces: list[str] = []
    for part in parts:
        if part.startswith("/"):
            raise ValueError(f"storage path {part!r} is absolute; give one relative to the store")
        for piece in part.split("/"):
            if piece in ("", "."):
                continue
            if piece == "..":
                raise ValueError(f"storage path {part!r} leaves the store; remove the '..'")
            if is_hidden(piece):
                raise ValueError(f"storage path {part!r}: names starting {HIDDEN!r} are reserved")
            pieces.append(piece)
    return "/".join(pieces)


def has_magic(text: str) -> bool:
    """Whether text holds a wildcard of a glob pattern."""
    return any(character in text for character in "*?[")


def split_pattern(pattern: str) -> tuple[str, list[str]]:
    """Split a glob into the folder before its first wildcard and the remaining components.

    `cells/*/result.json` -> ("cells", ["*", "result.json"]).
    """
    parts = join(pattern).split("/")
    fixed = 0
    while fixed < len(parts) - 1 and not has_magic(parts[fixed]):
        fixed += 1
    return "/".join(parts[:fixed]), parts[fixed:]


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Match path components: `*` stays within one component, `**` spans any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        rest = pattern[1:]
        if not rest:
            return bool(parts)
        return any(matches(parts[i:], rest) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def fingerprint(value: object) -> str:
    """blake2b-128 of any JSON-able value, in hex."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def flatten(value: object, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with dotted keys."""
    if isinstance(value, dict) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)) and value:
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else key))
    return flat
