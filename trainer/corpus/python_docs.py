"""The prose that ships with CPython: a real English corpus of about 2 MB on every machine.

`pydoc_data.topics` (the language reference) and the docstrings of the standard library. The files
are parsed, never imported, so nothing runs.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

MIN_CHARS = 80  # shorter docstrings are hardly prose
PARTS = 4  # shards of the standard library, beside the one of the topics
SKIPPED = {
    "test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "turtledemo",
    "pydoc_data", "__pycache__",
}  # fmt: skip


def version() -> str:
    """The Python version, on which the texts depend."""
    return platform.python_version()


def ranges() -> list[tuple[int, int]]:
    """(first, after the last) file number per shard; (-1, 0) stands for the topics."""
    sizes = list(accumulate(path.stat().st_size for path in _sources()))
    if not sizes:
        raise ValueError(
            "data.train: builtin:python-docs found no .py files of the standard library at "
            f"{_library()}; use a Python that has them, or local files"
        )
    edges = [0]
    for part in range(1, PARTS):
        edges.append(next(i for i, total in enumerate(sizes) if total * PARTS >= sizes[-1] * part))
    edges.append(len(sizes))
    return [(-1, 0), *zip(edges, edges[1:], strict=False)]


@lru_cache(maxsize=PARTS + 1)  # 2 MB; parsing takes seconds, and a process reads them often
def documents(start: int, stop: int) -> tuple[str, ...]:
    """The texts of one range of `ranges()`."""
    if start < 0:
        from pydoc_data.topics import topics

        return tuple(topics[name] for name in sorted(topics))
    return tuple(text for path in _sources()[start:stop] for text in _docstrings(path))


def fingerprint() -> dict[str, str | int]:
    """Python version, number of texts, and a hash of them."""
    texts, size, digest = 0, 0, hashlib.blake2b(digest_size=16)
    for start, stop in ranges():
        for text in documents(start, stop):
            data = text.encode()
            texts, size = texts + 1, size + len(data)
            digest.update(len(data).to_bytes(8, "little") + data)
    return {"python": version(), "texts": texts, "bytes": size, "content": digest.hexdigest()}


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _sources() -> list[Path]:
    root = _library()
    found: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]  # not even looked into
        relative = Path(folder).relative_to(root)
        found += [(relative / name).as_posix() for name in names if name.endswith(".py")]
    return [root / path for path in sorted(found)]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old files
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_CHARS:
                yield text
        # Expressions hold no docstrings; the stack gives source order.
        children = list(ast.iter_child_nodes(node))
        waiting += [c for c in reversed(children) if isinstance(c, (ast.stmt, ast.excepthandler))]
