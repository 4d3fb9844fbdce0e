"""What of a checkout travels to a cluster: which files, how large, and never what is private."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from cluster.storage.store import format_bytes

# By name, wherever in the checkout.
EXCLUDES = (
    ".git",
    ".gitignore",  # Ray would go by it, and leave out what is listed here to travel
    ".venv",
    "venv",
    "runs",
    "wandb",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.egg-info",
    "node_modules",
    "*.pyc",
    # What may hold secrets.
    ".env",
    ".env.*",
    ".envrc",
    ".netrc",
    ".pypirc",
    ".git-credentials",
    ".aws",
    ".ssh",
    "credentials*.json",
    "secrets.*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "id_rsa*",
    "id_ecdsa*",
    "id_ed25519*",
)
LIMIT_BYTES = 100 * 10**6


class TooLarge(ValueError):
    """The checkout is too large to travel; the message names the largest files."""


def checkout() -> Path:
    """The folder that `jobs`, `cluster`, `trainer` and `quant` are imported from."""
    return Path(__file__).resolve().parent.parent


def ray_excludes() -> list[str]:
    """The excludes as Ray takes them, in the form of .gitignore."""
    return list(EXCLUDES)


def travelling(root: Path) -> dict[str, int]:
    """Bytes of every file that travels, by its path below `root`; links to folders do not."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not _excluded(name))
        for name in sorted(files):
            path = Path(folder) / name
            if not _excluded(name) and path.is_file():
                found[path.relative_to(root).as_posix()] = path.stat().st_size
    return found


def check_size(files: dict[str, int], root: Path) -> int:
    """Bytes in all. Raises TooLarge above LIMIT_BYTES, naming the largest files."""
    total = sum(files.values())
    if total > LIMIT_BYTES:
        largest = sorted(files.items(), key=lambda item: -item[1])[:5]
        named = ", ".join(f"{name} ({format_bytes(size)})" for name, size in largest)
        raise TooLarge(
            f"{root}: {format_bytes(total)} would travel to the cluster, at most "
            f"{format_bytes(LIMIT_BYTES)} may; the largest files are {named}; move them out of the "
            "checkout"
        )
    return total


def stage(root: Path, files: Sequence[str], target: Path) -> None:
    """Copies the files to `target`, which is made."""
    for name in files:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, path)
        shutil.copymode(root / name, path)


def _excluded(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in EXCLUDES)
