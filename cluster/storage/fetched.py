"""A local cache of downloaded objects, so that remote ones can be memory-mapped."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Whichever of these a filesystem reports tells a replaced object from the one fetched before.
VERSION_KEYS = ("size", "ETag", "etag", "md5Hash", "generation", "VersionId", "created", "mtime")


def cache_folder() -> Path:
    """STILLHOUSE_CACHE, or `stillhouse` in XDG_CACHE_HOME (default ~/.cache)."""
    named = os.environ.get("STILLHOUSE_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stillhouse"


def version(info: dict[str, Any]) -> str:
    """What identifies the content of an object, from its fsspec info."""
    return repr([(key, str(info[key])) for key in VERSION_KEYS if info.get(key) is not None])


def fetched(url: str, version: str, download: Callable[[Path], None]) -> Path:
    """The cached copy of a URL at a version, downloaded first if it is not there yet.

    Several processes of a machine download it once: the others wait. A copy appears whole or
    not at all. Raises ValueError when the cache folder cannot be written.
    """
    target = place(url, version)
    home, digest = target.parent.parent, target.parent.name
    try:
        home.mkdir(parents=True, exist_ok=True)
        if target.exists():
            return target
        with _locked(home / f"{digest}.lock"):
            if target.exists():
                return target
            temporary = home / f".{digest}-{uuid.uuid4().hex}"
            try:
                temporary.mkdir()
                download(temporary / target.name)
                os.replace(temporary, target.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except PermissionError as error:
        raise ValueError(
            f"the download cache {home} is not writable; set STILLHOUSE_CACHE to a folder that is"
        ) from error
    return target


def place(url: str, version: str) -> Path:
    """Where the copy of a URL at a version is, or will be."""
    digest = hashlib.blake2b(f"{url}\n{version}".encode(), digest_size=16).hexdigest()
    # One folder per version, and the object's own name in it: readers go by the suffix.
    return cache_folder() / "objects" / digest / url.rpartition("/")[2]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the kernel even when the holder is killed
        yield
