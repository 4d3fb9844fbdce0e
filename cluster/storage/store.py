"""The one door to shared files: a folder on any fsspec URL, whose objects are published whole.

Remote objects that are read again, or memory-mapped, are kept in a local cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage import strict_json
from cluster.storage.keys import HIDDEN, join, matches, split_pattern
from cluster.storage.local import LocalFolder, walk

if TYPE_CHECKING:
    from cluster.storage.remote import RemoteObjects

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


TRANSFERS = 8  # objects of a folder that travel at once
Names = list[str]  # spelled before the class, where `list` is a method
ONE_SLASH = re.compile(r"^(s3a?|gs|gcs|abfss?|az|memory|file|local|https?|ftp|sftp|hdfs):(?!//)")


class Store:
    """A folder that all machines share; paths given to it are relative, "" is the folder itself.

    A reader sees an object whole or not at all, and always the newest listing. Picklable: it
    holds the URL and the storage options, and opens the filesystem at first use.
    """

    def __init__(self, backend: LocalFolder | RemoteObjects, prefix: str = "") -> None:
        self._backend = backend
        self._prefix = prefix

    @property
    def url(self) -> str:
        """The full URL, or the absolute path of a local folder, without a trailing slash."""
        return self._backend.full(self._prefix)

    @property
    def name(self) -> str:
        """The last component of the URL."""
        return self.url.rpartition("/")[2]

    def __repr__(self) -> str:  # without the options: they may hold credentials
        return f"Store({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def sub(self, *parts: str) -> Store:
        """The store of a folder in this one. Raises ValueError for a path that leaves it."""
        return Store(self._backend, self._key(*parts))

    def path(self, *parts: str) -> str:
        """The full URL of an object in this store."""
        return self.sub(*parts).url

    def exists(self, p: str = "") -> bool:
        """Whether an object, or a folder with objects in it, is there."""
        return self._backend.exists(self._key(p))

    def size(self, p: str) -> int:
        """Bytes of an object. Raises FileNotFoundError with the full URL."""
        return self._backend.size(self._key(p))

    def list(self, p: str = "") -> Names:
        """Sorted names of the objects and folders in a folder; [] if there is none."""
        return self._backend.list(self._key(p))

    def sizes(self, p: str = "") -> dict[str, int]:
        """Bytes of the objects in a folder (not of those below it), by name, in one listing."""
        return self._backend.find(self._key(p), 1)

    def modified(self, p: str) -> float:
        """When an object was last published, in Unix seconds of the storage's clock."""
        return self._backend.modified(self._key(p))

    def glob(self, pattern: str) -> Names:
        """Sorted relative paths of the objects that match, such as `cells/*/result.json`.

        `*`, `?` and `[..]` stay within one component, `**` spans any number; never folders.
        """
        folder, rest = split_pattern(pattern)
        depth = None if "**" in rest else len(rest)
        found = self._backend.find(self._key(folder), depth)
        names = [name for name in found if matches(name.split("/"), rest)]
        return sorted(join(folder, name) for name in names)

    def read_bytes(self, p: str) -> bytes:
        """The whole object. Raises FileNotFoundError with the full URL."""
        return self._backend.read(self._key(p))

    def read_range(self, p: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of an object; fewer where it ends before.

        Raises ValueError unless 0 <= start <= stop, FileNotFoundError with the full URL.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"{self.path(p)}: no range of bytes from {start} to {stop}")
        return self._backend.read_range(self._key(p), start, stop)

    def read_text(self, p: str) -> str:
        """The whole object as UTF-8."""
        return self.read_bytes(p).decode("utf-8")

    def read_json(self, p: str) -> Any:  # noqa: ANN401
        """The object parsed as JSON. Raises ValueError, with the URL, if it is not."""
        try:
            return json.loads(self.read_bytes(p))
        except ValueError as error:
            raise ValueError(f"{self.path(p)} is not valid JSON: {error}") from error

    def write_bytes(self, p: str, data: bytes) -> None:
        """Publish an object, replacing an older one, in one step."""
        self._backend.write(self._key(p), bytes(data))

    def write_text(self, p: str, text: str) -> None:
        """Publish a text as UTF-8."""
        self.write_bytes(p, text.encode("utf-8"))

    def write_json(self, p: str, value: object) -> None:
        """Publish a value as strict, indented JSON: NaN is written as null, see `strict_json`."""
        self.write_bytes(p, strict_json.encode(value, indent=2) + b"\n")

    def create(self, p: str, data: bytes) -> bool:
        """Publish an object only if there is none: of many writers one gets True.

        Raises ValueError on a filesystem that cannot decide this, naming it.
        """
        return self._backend.create(self._key(p), bytes(data))

    def delete(self, p: str, recursive: bool = False) -> None:
        """Delete an object, or with recursive a folder. Raises FileNotFoundError if missing."""
        self._backend.delete(self._key(p), recursive)

    def upload_folder(self, local_dir: str | os.PathLike[str], p: str) -> None:
        """Publish every file of a local folder under p; each is whole, the set is not one step.

        Links are followed, empty folders are left out, and other objects under p stay.
        """
        source = Path(local_dir)
        if not source.is_dir():
            raise FileNotFoundError(f"{source} is not a folder")
        keys = {name: self._key(p, name) for name, _ in walk(source)}
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda item: self._backend.put(source / item[0], item[1]), keys.items()))

    def download_folder(self, p: str, local_dir: str | os.PathLike[str]) -> None:
        """Copy every object under p to a local folder, each whole; other files there stay.

        Raises FileNotFoundError, with the full URL, if there is no object under p.
        """
        found = self._backend.find(self._key(p))
        if not found:
            raise FileNotFoundError(f"no objects under {self.path(p)}")
        target = Path(local_dir)

        def get(item: tuple[str, int]) -> None:
            name, size = item
            self._get(self._key(p, name), target / name, size)

        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(get, found.items()))

    def download(self, p: str, target: str | os.PathLike[str]) -> None:
        """Copy an object to a local file, which is whole or not there; never a cached copy.

        Raises FileNotFoundError if missing.
        """
        self._get(self._key(p), Path(target), self.size(p))

    def local(self, p: str = "") -> Path | None:
        """The real path when the store is a local folder, else None."""
        backend = self._backend
        return backend.file(self._key(p)) if isinstance(backend, LocalFolder) else None

    def fetch(self, p: str) -> Path:
        """A local file to read or memory-map: the object itself when local, else a cached copy.

        A replaced object is downloaded anew. The cache (see STILLHOUSE_CACHE) only grows.
        """
        backend, key = self._backend, self._key(p)
        if isinstance(backend, LocalFolder):
            backend.size(key)  # raises when missing
            return backend.file(key)
        info = backend.info(key)
        wanted = version(info)

        def download(to: Path) -> None:
            self._get(key, to, int(info["size"]))
            if version(backend.info(key)) != wanted:
                raise OSError(f"{self.path(p)} was replaced while it was fetched; fetch it again")

        return fetched(self.path(p), wanted, download)

    def fetch_folder(self, p: str) -> Path:
        """A local folder with every object under p: itself when local, else a cached copy."""
        backend, key = self._backend, self._key(p)
        if isinstance(backend, LocalFolder):
            if not backend.file(key).is_dir():
                raise FileNotFoundError(f"no folder at {self.path(p)}")
            return backend.file(key)
        identity = _identity(backend, key)
        return fetched(self.path(p), identity, lambda to: self.download_folder(p, to))

    def has_copy(self, p: str = "") -> bool:
        """Whether `fetch_folder` would find the folder on this machine, and fetch nothing."""
        backend, key = self._backend, self._key(p)
        if isinstance(backend, LocalFolder):
            return True
        return place(self.path(p), _identity(backend, key)).exists()

    def check_writable(self) -> None:
        """Raise ValueError, in one line that says why and how to mend it, if writing fails here.

        Probes with an exclusive create, which attempts need, and leaves nothing behind.
        """
        backend = self._backend
        if isinstance(backend, LocalFolder):
            LocalFolder(self.url).check_writable()
        else:
            type(backend)(self.url, backend.options).check_writable()

    def _key(self, *parts: str) -> str:
        return join(self._prefix, *parts)

    def _get(self, key: str, target: Path, size: int) -> None:
        """Download whole: through a hidden file beside the target, of the expected size."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{HIDDEN}{os.getpid()}-{target.name}")
        try:
            self._backend.get(key, temporary)
            if temporary.stat().st_size != size:
                raise OSError(
                    f"{self._backend.full(key)} changed while it was read: "
                    f"{temporary.stat().st_size} bytes came, {size} were announced"
                )
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def _identity(backend: RemoteObjects, key: str) -> str:
    """What identifies the contents of a remote folder."""
    infos = backend.find_info(key)
    return repr([(name, version(info)) for name, info in infos.items()])


def open_store(url: str | os.PathLike[str], **options: Any) -> Store:
    """Open a folder on any fsspec URL or local path: `./runs`, `s3://bucket/prefix`, `gs://..`.

    Nothing is touched yet. A relative path is made absolute here, because workers start in other
    folders. Options go to the filesystem (`endpoint_url` of s3); S3 also reads AWS_ENDPOINT_URL.
    Raises ValueError for an empty or misspelled URL.
    """
    text = os.fspath(url)
    if not text.strip():
        raise ValueError("storage: the URL is empty; give a folder or a URL such as s3://bucket/x")
    if ONE_SLASH.match(text):
        protocol, _, rest = text.partition(":")
        raise ValueError(f"storage: {text} is no URL; write {protocol}://{rest.lstrip('/')}")
    protocol, mark, rest = text.partition("://")
    if not mark or protocol in ("file", "local"):
        folder = os.path.abspath(os.path.expanduser(rest if mark else text))
        return Store(LocalFolder(folder))
    from cluster.storage.remote import RemoteObjects

    parts = [part for part in rest.split("/") if part]
    if not parts and protocol != "memory":
        raise ValueError(f"storage: {text} names no bucket; write {protocol}://bucket/prefix")
    return Store(RemoteObjects(f"{protocol}://{'/'.join(parts)}", options))


def format_bytes(count: float) -> str:
    """Bytes in powers of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:  # 999,600 is 1 MB, not 1e+03 kB
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
