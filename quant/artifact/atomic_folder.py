"""A folder of files that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.storage.strict_json import broken


@contextmanager
def whole_folder(
    folder: Path, keep: Callable[[Path], bool], replace: Callable[[Path], Collection[str]]
) -> Iterator[Path]:
    """Gives an empty folder to write into, which becomes `folder` when the block ends well.

    It lies beside `folder` until then, and is removed if the block raises. A `folder` that exists
    is replaced: what is in it and `keep` holds for is carried over, `replace(folder)` names the
    files that may go. Raises ValueError (one line) when it holds anything else, or no folder can
    be made there.
    """
    target = Path(os.path.realpath(folder))
    _check(target, keep, replace)
    mark = f".{target.name}.{uuid.uuid4().hex[:12]}"
    partial, old = target.parent / f"{mark}.partial", target.parent / f"{mark}.old"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise broken(
            folder, f"no folder can be made there ({error.strerror}); name another"
        ) from None
    try:
        yield partial
        if target.exists():
            _check(target, keep, replace)  # again: writing took its time
            for path in sorted(target.iterdir()):
                if keep(path) and not (partial / path.name).exists():
                    (shutil.copytree if path.is_dir() else shutil.copy2)(path, partial / path.name)
        _sync(partial)
        _swap(partial, target, old)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _check(
    target: Path, keep: Callable[[Path], bool], replace: Callable[[Path], Collection[str]]
) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise broken(target, "a file is in the way; name another folder")
    ours = replace(target)
    for path in sorted(target.iterdir()):
        if not (keep(path) or (path.is_file() and path.name in ours)):
            raise broken(
                target,
                f"it holds {path.name}, which is no part of a quantized model, and would be "
                "replaced; name another folder, or an empty one",
            )


def _swap(partial: Path, target: Path, old: Path) -> None:
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
    except BaseException as error:
        if old.exists() and not target.exists():
            os.rename(old, target)
        if isinstance(error, OSError):  # a mount point, for one
            raise broken(
                target, f"it cannot be replaced ({error.strerror}); name a folder inside of it"
            ) from None
        raise


def _sync(folder: Path) -> None:
    """Have the folder's entries on disk: a rename is safe only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
