"""Objects in a local (or mounted) folder: every write is whole, every create exclusive."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.storage.keys import HIDDEN, is_hidden

NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class LocalFolder:
    """Backend of a Store whose URL is an absolute local path; keys are relative paths."""

    def __init__(self, root: str) -> None:
        self.url = root
        self.root = Path(root)

    def file(self, key: str) -> Path:
        return self.root / key if key else self.root

    def full(self, key: str) -> str:
        return str(self.file(key))

    def exists(self, key: str) -> bool:
        return os.path.exists(self.file(key))

    def size(self, key: str) -> int:
        with self._named(key):
            path = self.file(key)
            if path.is_dir():
                raise IsADirectoryError
            return path.stat().st_size

    def list(self, key: str) -> list[str]:
        try:
            return sorted(n for n in os.listdir(self.file(key)) if not is_hidden(n))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def find(self, key: str, depth: int | None = None) -> dict[str, int]:
        """Relative path -> bytes of every file under a folder, at most `depth` levels down."""
        return dict(walk(self.file(key), depth))

    def read(self, key: str) -> bytes:
        with self._named(key):
            return self.file(key).read_bytes()

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Reads, and does not map: a file that is cut while it is mapped kills the process."""
        with self._named(key), open(self.file(key), "rb", buffering=0) as file:
            # Not more than there is: the buffer is allocated before anything is read.
            stop = min(stop, os.fstat(file.fileno()).st_size)
            pieces = []
            while start < stop:  # the kernel gives at most 2 GiB at once
                pieces.append(os.pread(file.fileno(), stop - start, start))
                if not pieces[-1]:
                    break
                start += len(pieces[-1])
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def modified(self, key: str) -> float:
        with self._named(key):
            return self.file(key).stat().st_mtime

    def write(self, key: str, data: bytes) -> None:
        with self._publishing(key) as temporary:
            _write_synced(temporary, data)
            os.replace(temporary, self.file(key))

    def create(self, key: str, data: bytes) -> bool:
        """Publish data unless the object exists; a hard link is the one exclusive, whole step."""
        target = self.file(key)
        if os.path.lexists(target):
            return False
        with self._publishing(key) as temporary:
            _write_synced(temporary, data)
            try:
                os.link(temporary, target)
            except FileExistsError:
                # NFS may repeat a link whose answer was lost: two names mean that it was ours.
                return os.stat(temporary).st_nlink > 1
            except OSError as error:
                if error.errno in NO_LINKS:
                    raise ValueError(
                        f"storage: the filesystem at {target.parent} has no hard links, so it "
                        f"cannot create an object exclusively ({error.strerror}); use a local "
                        "disk, NFS, or an s3://, gs:// or abfs:// URL"
                    ) from error
                raise
        return True

    def delete(self, key: str, recursive: bool) -> None:
        target = self.file(key)
        with self._named(key):
            if not target.is_dir() or target.is_symlink():
                target.unlink()
                return
        if not recursive:
            raise ValueError(f"{target} is a folder; delete it with recursive=True")
        shutil.rmtree(target)

    def put(self, source: Path, key: str) -> None:
        """Publish a copy of a local file."""
        with self._publishing(key) as temporary:
            shutil.copyfile(source, temporary)
            _sync(temporary)
            os.replace(temporary, self.file(key))

    def get(self, key: str, target: Path) -> None:
        """Copy an object to a local file (which may end up half-written: give a temporary)."""
        with self._named(key):
            shutil.copyfile(self.file(key), target)

    def check_writable(self) -> None:
        """Probe the folder, or the nearest one above that exists; leaves nothing behind.

        Raises ValueError for a file in the folder's place, a folder that refuses writes, and a
        filesystem without exclusive create.
        """
        above = self.root
        while not os.path.lexists(above) and above != above.parent:
            above = above.parent
        if not os.path.isdir(above):
            what = "is a file" if os.path.exists(above) else "is a link to nothing"
            raise ValueError(
                f"storage: {above} {what}, and {self.root} must be a folder; "
                "remove it or name another folder"
            )
        probe = f"{HIDDEN}probe-{uuid.uuid4().hex}"
        try:
            LocalFolder(str(above)).create(probe, b"probe")
        except OSError as error:
            raise ValueError(
                f"storage: {self.root} is not writable ({above}: {error.strerror}); "
                "change its permissions or name another folder"
            ) from error
        finally:
            with suppress(OSError):
                (above / probe).unlink()

    @contextmanager
    def _named(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(errno.ENOENT, "No such object", str(self.file(key))) from error

    @contextmanager
    def _publishing(self, key: str) -> Iterator[Path]:
        """A temporary beside the target (same filesystem, hidden), gone afterwards."""
        folder = self.file(key).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{HIDDEN}{uuid.uuid4().hex}"
        try:
            yield temporary
            _sync(folder)  # so that the new name, too, survives a power cut
        finally:
            with suppress(OSError):
                temporary.unlink()


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:  # open, not mkstemp: the umask decides who else may read it
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network filesystems refuse it on folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def walk(folder: Path, depth: int | None = None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield (relative path, bytes) of every file under a folder, in order; links are followed."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            if depth is None or depth > 1:
                below = None if depth is None else depth - 1
                yield from walk(Path(entry.path), below, f"{prefix}{entry.name}/")
        else:
            with suppress(FileNotFoundError):  # deleted since the listing
                yield f"{prefix}{entry.name}", entry.stat().st_size
