"""Objects behind any other fsspec URL: S3, GCS, Azure, and `memory://` in tests."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage.keys import HIDDEN, has_magic, is_hidden

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# Their drivers pass mode="create" on as a conditional put. The default of fsspec for all others
# looks first and writes then, so two writers can both believe that they were first.
CONDITIONAL_PUT = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
WORKS = "use a local folder, or an s3://, gs:// or abfs:// URL"
RETRIES = 8


class RemoteObjects:
    """Backend of a Store on an fsspec filesystem; picklable, and opened at first use."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.url = url
        self.options = options
        self._fs: Any = None
        self._pid = 0
        self._root = ""
        self._exclusive = False  # this server was seen to refuse a second create

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], state["options"])  # type: ignore[misc]

    @property
    def fs(self) -> AbstractFileSystem:
        """The filesystem of this process: an async one opened before a fork is dead after it."""
        if self._fs is None or self._pid != os.getpid():
            self._fs, self._root = _open(self.url, self.options)
            self._pid = os.getpid()
        return self._fs

    @property
    def protocol(self) -> str:
        return self.url.partition("://")[0]

    def full(self, key: str) -> str:
        bare = not key or self.url.endswith("://")
        return self.url + key if bare else f"{self.url}/{key}"

    def inner(self, key: str) -> str:
        """The path as the filesystem itself spells it (without protocol)."""
        _ = self.fs
        return f"{self._root}/{key}" if key else self._root

    def exists(self, key: str) -> bool:
        return bool(self.fs.exists(self.inner(key)))

    def info(self, key: str) -> dict[str, Any]:
        with self._named(key):
            found: dict[str, Any] = self.fs.info(self.inner(key))
            if found["type"] != "file":
                raise IsADirectoryError
            return found

    def size(self, key: str) -> int:
        return int(self.info(key)["size"])

    def list(self, key: str) -> list[str]:
        return sorted({name for name, _ in self._children(key)})

    def find(self, key: str, depth: int | None = None) -> dict[str, int]:
        """Relative path -> bytes of every object under a folder."""
        if depth == 1:  # one listing of this folder instead of all below it
            return {n: int(i["size"]) for n, i in self._children(key) if i["type"] == "file"}
        return {name: int(info["size"]) for name, info in self.find_info(key).items()}

    def find_info(self, key: str) -> dict[str, dict[str, Any]]:
        prefix = self.inner(key).rstrip("/") + "/"
        try:
            found: dict[str, dict[str, Any]] = self.fs.find(prefix.rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        return {
            name[len(prefix) :]: info
            for name, info in sorted(found.items())
            if name.startswith(prefix)
            and not name.endswith("/")
            and not is_hidden(name.rpartition("/")[2])
        }

    def read(self, key: str) -> bytes:
        with self._named(key):
            return bytes(self.fs.cat_file(self.inner(key)))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        if start == stop:
            self.info(key)  # raises when missing
            return b""
        with self._named(key):
            try:
                return bytes(self.fs.cat_file(self.inner(key), start=start, end=stop))
            except Exception as error:
                if set(_codes(error)) & {"InvalidRange", "416"}:  # it ends before
                    return b""
                raise

    def modified(self, key: str) -> float:
        with self._named(key):
            return float(self.fs.modified(self.inner(key)).timestamp())

    def write(self, key: str, data: bytes) -> None:
        self.fs.pipe_file(self.inner(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Publish data unless the object exists, decided by the server in one request."""
        if self.protocol == "memory":
            return self._create_in_memory(key, data)
        if self.protocol not in CONDITIONAL_PUT:
            raise ValueError(
                f"storage: {self.url}: {self.protocol}:// cannot create an object exclusively, "
                f"which attempts and events need; {WORKS}"
            )
        mark = uuid.uuid4().hex
        if not self._put_new(key, data, mark):
            # A request whose answer was lost is repeated by the driver, and then refused because
            # of itself. The mark tells that apart from another writer's object.
            return self._mark(key) == mark
        if not self._exclusive:
            if self._put_new(key, data, mark):
                raise ValueError(
                    f"storage: the server behind {self.url} ignores conditional writes "
                    f"(If-None-Match), so it cannot create an object exclusively; {WORKS}"
                )
            self._exclusive = True
        return True

    def delete(self, key: str, recursive: bool) -> None:
        target = self.inner(key)
        if key and self.fs.isfile(target):
            self.fs.rm_file(target)
            return
        below = [f"{target}/{name}" for name in self.find_info(key)]
        if not below:
            raise FileNotFoundError(errno.ENOENT, "No such object", self.full(key))
        if not recursive:
            raise ValueError(f"{self.full(key)} is a folder; delete it with recursive=True")
        if any(has_magic(name) for name in below):  # rm would read these names as patterns
            for name in below:
                self.fs.rm_file(name)
        else:
            self.fs.rm(below)

    def put(self, source: Path, key: str) -> None:
        """Publish a copy of a local file."""
        if self.protocol == "memory":  # its put_file fills the visible object piece by piece
            self.write(key, source.read_bytes())
        else:
            self.fs.put_file(str(source), self.inner(key))

    def get(self, key: str, target: Path) -> None:
        """Copy an object to a local file (which may end up half-written: give a temporary)."""
        with self._named(key):
            self.fs.get_file(self.inner(key), str(target))

    def check_writable(self) -> None:
        """Create a probe twice and delete it; ValueError says in one line what is wrong."""
        fs, probe = self.fs, f"{HIDDEN}probe-{uuid.uuid4().hex}"
        try:
            if "/" in self._root.strip("/") and fs.isfile(self._root):
                raise ValueError(
                    f"storage: {self.url} is an object, and must be a folder; "
                    "remove it or name another prefix"
                )
            if not self.create(probe, b"probe") or self.create(probe, b"probe"):
                raise ValueError(f"storage: {self.url} did not keep a probe object; {WORKS}")
        except ValueError:
            raise
        except FileNotFoundError as error:
            raise ValueError(
                f"storage: {self.url}: the bucket does not exist; create it or name another"
            ) from error
        except Exception as error:  # each driver has its own errors for network and credentials
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"storage: {self.url} is not writable ({reason}); check its credentials, "
                "permissions and endpoint"
            ) from error
        finally:
            with suppress(Exception):
                fs.rm_file(self.inner(probe))

    def _children(self, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        prefix = self.inner(key).rstrip("/") + "/"
        try:
            entries = self.fs.ls(prefix.rstrip("/"), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            name = entry["name"].rstrip("/")
            if name.startswith(prefix) and not is_hidden(name[len(prefix) :]):
                yield name[len(prefix) :], entry

    def _create_in_memory(self, key: str, data: bytes) -> bool:
        from fsspec.implementations.memory import MemoryFile

        path = self.inner(key)
        made = MemoryFile(self.fs, path, data)
        return self.fs.store.setdefault(path, made) is made  # atomic among threads

    def _put_new(self, key: str, data: bytes, mark: str) -> bool:
        """One conditional put; False when the object is there already."""
        extra: dict[str, Any] = {}
        if self.protocol in ("s3", "s3a"):
            extra = {"Metadata": {"creator": mark}}
        elif self.protocol in ("gs", "gcs"):
            extra = {"metadata": {"creator": mark}}
        for attempt in range(RETRIES):
            try:
                self.fs.pipe_file(self.inner(key), data, mode="create", **extra)
                return True
            except Exception as error:
                codes = set(_codes(error))
                if codes & {"FileExists", "PreconditionFailed", "412"}:
                    return False
                if codes & {"NotImplemented", "501"}:
                    raise ValueError(
                        f"storage: the server behind {self.url} has no conditional writes, so it "
                        f"cannot create an object exclusively; {WORKS}"
                    ) from error
                if not codes & {"ConditionalRequestConflict", "OperationAborted", "409"}:
                    raise
                if attempt == RETRIES - 1:
                    raise
                time.sleep(0.05 * 2**attempt)  # two at once: S3 asks both to try again
        raise AssertionError("unreachable")

    def _mark(self, key: str) -> str | None:
        with suppress(Exception):  # unknown is taken as another's: a claim is then made anew
            return str(self.fs.getxattr(self.inner(key), "creator"))
        return None

    @contextmanager
    def _named(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            raise FileNotFoundError(errno.ENOENT, "No such object", self.full(key)) from error


def _codes(error: BaseException | None) -> Iterator[str]:
    """Server error codes along a chain of exceptions (drivers wrap them in OSError)."""
    while error is not None:
        if isinstance(error, FileExistsError):
            yield "FileExists"
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            yield str(response.get("Error", {}).get("Code", ""))
        yield str(getattr(error, "code", ""))
        error = error.__cause__


def _open(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    from fsspec.core import url_to_fs
    from fsspec.registry import get_filesystem_class, known_implementations

    protocol = url.partition("://")[0]
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        package = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
        hint = f"pip install {package}" if package not in ("", "fsspec") else str(error)
        raise ValueError(
            f"storage: {url} needs a driver that is not installed here; {hint}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"storage: {url}: {protocol}:// is not a known kind of storage; {WORKS}"
        ) from error
    # Without the listings cache: other machines write here, and a cached listing hides it.
    fs, root = url_to_fs(url, **{"use_listings_cache": False, **options})
    return fs, root.rstrip("/")
