"""Parts of objects, sizes by one listing, and times of publishing, on every kind of storage."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from cluster.storage import Store, open_store

DATA = bytes(range(256)) * 5


@pytest.mark.parametrize(
    "start, stop",
    [(0, 1), (7, 300), (0, len(DATA)), (1279, 1280), (1270, 5000), (1280, 1290), (9999, 10_000)]
    + [(0, 0), (7, 7), (1280, 1280), (0, 1 << 60)],
)
def test_a_range_is_what_python_slices(store: Store, start: int, stop: int) -> None:
    store.write_bytes("folder/x", DATA)
    assert store.read_range("folder/x", start, stop) == DATA[start:stop]


def test_ranges_of_nothing(store: Store) -> None:
    store.write_bytes("folder/empty", b"")
    assert store.read_range("folder/empty", 0, 10) == b""
    for name in ("gone/x", "folder"):
        for stop in (0, 4):
            with pytest.raises(FileNotFoundError) as caught:
                store.read_range(name, 0, stop)
            assert store.path(name) in str(caught.value)
    for start, stop in ((-1, 4), (4, 3)):
        with pytest.raises(ValueError, match=f"no range of bytes from {start} to {stop}"):
            store.read_range("folder/empty", start, stop)


def test_a_range_longer_than_the_object_takes_no_memory(tmp_path: Path) -> None:
    """A reader that believes a damaged length would allocate it before anything is read."""
    store = open_store(tmp_path)
    store.write_bytes("x", DATA)
    tracemalloc.start()
    assert store.read_range("x", 5, 1 << 40) == DATA[5:]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_range_reads_no_more_than_that(s3_env: str, monkeypatch) -> None:
    import s3fs

    store = open_store(f"s3://bucket/ranges-{time.time_ns()}")
    store.write_bytes("x", DATA)
    asked = []
    real = s3fs.S3FileSystem._call_s3

    async def call(self, method, *arguments, **options):
        asked.append((method, options.get("Range")))
        return await real(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    assert store.read_range("x", 100, 110) == DATA[100:110]
    assert asked == [("get_object", "bytes=100-109")]


def test_sizes_are_of_the_objects_in_a_folder(store: Store) -> None:
    store.write_bytes("a/one", b"1")
    store.write_bytes("a/three", b"123")
    store.write_bytes("a/below/two", b"12")
    assert store.sizes("a") == {"one": 1, "three": 3}
    assert store.sizes("nowhere") == {} and store.sizes("a/one") == {}


def test_the_time_of_publishing(store: Store) -> None:
    store.write_bytes("x", b"1")
    assert abs(store.modified("x") - time.time()) < 60
    with pytest.raises(FileNotFoundError) as caught:
        store.modified("gone")
    assert store.path("gone") in str(caught.value)
    path = store.local("x")
    if path is not None:
        os.utime(path, (0, 1000))
        assert store.modified("x") == 1000
