"""The logit cache on storage: shards, codebooks, identities, and readers."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cluster.storage import Store, open_store
from cluster.storage.keys import fingerprint
from cluster.storage.remote import RemoteObjects
from tests.bench.opening import measure
from tests.fixtures.s3 import REGION, s3_server
from trainer.logits.codebook import Codebook
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import decode, encode
from trainer.logits.index import Index, pack
from trainer.logits.reader import CacheReader, read_along
from trainer.logits.records import Coding, Records
from trainer.logits.store import (
    CacheDamaged,
    CacheMismatch,
    check_identity,
    open_cache,
    publish_codebook,
    read_codebook,
    write_shard,
)

IDENTITY = {"format": 2, "teacher.name": "big", "cache.k": 4, "cache.temperatures.0": 1.0}
CODING = Coding("topk", vocab=4096, k=4)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def records(number: int, positions: int = 6, k: int = 4, first: float = 0.5) -> Records:
    """Records whose ids say which sequence they are of."""
    ids = np.tile(10 * number + np.arange(k), (positions, 1))
    p = np.tile(first * 0.5 ** np.arange(k), (positions, 1))
    tail = np.log(1 - p.sum(axis=1, keepdims=True))
    return Records(ids, np.log(p).astype(np.float32), tail.astype(np.float32))


CODEBOOK = fit_codebook(CODING, [records(n) for n in range(20)])


def blob(number: int, **how) -> bytes:
    return encode(records(number, **how), CODEBOOK)


def write(cache: Store, numbers, kind: str = "train", **how) -> tuple[str, int]:
    publish_codebook(cache, kind, CODEBOOK)
    return write_shard(cache, kind, [key(n) for n in numbers], [blob(n, **how) for n in numbers])


def number_of(item: Records) -> int:
    (first,) = set(item.ids[:, 0].tolist())
    return first // 10


def equal(one: Records, other: Records) -> bool:
    """Of equal records also the places that fill up ragged rows are equal."""
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("ids", "log_probs", "log_tails")
    )


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path) -> Store:
    if request.param == "local":
        return open_store(tmp_path)
    if request.param == "memory":
        return open_store(f"memory://logits-{tmp_path.name}-{id(tmp_path)}")
    endpoint = request.getfixturevalue("s3_endpoint")
    region = {"region_name": REGION}
    return open_store(
        f"s3://bucket/{tmp_path.name}",
        endpoint_url=endpoint,
        key="test",
        secret="test",
        client_kwargs=region,
    )


@pytest.fixture
def cache(store) -> Store:
    return open_cache(store, IDENTITY)


def test_records_are_found_by_key_not_by_order(cache) -> None:
    """A cache keyed by the order of iteration gives other targets after a reshuffle."""
    write(cache, [3, 1])
    write(cache, [2])
    reader = CacheReader(cache, "train")
    assert len(reader) == 3 and [int(row[-1]) for row in reader.keys] == [1, 2, 3]
    for number in (2, 3, 1, 3):
        assert equal(reader.read(key(number)), decode(blob(number), CODEBOOK))
    reader.close()


def test_many_are_one_after_the_other_in_the_order_asked(cache) -> None:
    write(cache, [5, 1], positions=3)
    write(cache, [7])
    with CacheReader(cache, "train") as reader:
        found = reader.read_many([key(n) for n in (7, 1, 7, 5)])
        assert (found.ids[:, 0] // 10).tolist() == [7] * 6 + [1] * 3 + [7] * 6 + [5] * 3
        with pytest.raises(ValueError, match="at least one"):
            reader.read_many([])


def test_records_of_some_positions_are_laid_along_all(store) -> None:
    """A row per position that counts; the others get one that is a distribution too."""
    cache = open_cache(store, {**IDENTITY, "cache.positions": "loss"})
    publish_codebook(cache, "train", CODEBOOK)
    some = {n: records(n, positions=n) for n in (2, 3)}
    for n, item in some.items():
        item.ids[:] += 4 * np.arange(n)[:, None]  # each row says which one it is
        write_shard(cache, "train", [key(n)], [encode(item, CODEBOOK)])
    mask = np.array([[0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 0, 0]], np.float32)
    with CacheReader(cache, "train") as reader:
        assert reader.positions == "loss"
        found = read_along(reader, [key(3), key(2)], mask, "loss")
        assert found.ids.shape == (12, 4)
        counted = mask.reshape(-1) == 1
        rows = np.concatenate([decode(encode(some[n], CODEBOOK), CODEBOOK).ids for n in (3, 2)])
        assert np.array_equal(found.ids[counted], rows)
        assert all(row.tolist() in rows.tolist() for row in found.ids)
        assert np.isfinite(found.log_probs).all() and np.isfinite(found.log_tails).all()
        with pytest.raises(CacheDamaged, match=f"{key(2).hex()}: .* 2 positions; its .* has 3"):
            read_along(reader, [key(3), key(2)], mask[[0, 0]], "loss")
        with pytest.raises(CacheDamaged, match="a record of 3 positions; its sequence has 6"):
            read_along(reader, [key(3)], mask[:1], "all")


def test_without_a_word_about_it_all_positions_are_there(cache) -> None:
    write(cache, [1])
    with CacheReader(cache, "train") as reader:
        assert reader.positions == "all"
        every = read_along(reader, [key(1)], np.zeros((1, 6)), reader.positions)
        assert equal(every, reader.read(key(1)))


def test_kinds_are_kept_apart(cache) -> None:
    """`train` is also the beginning of `train1`."""
    for kind, first in (("train", 0.5), ("train1", 0.3), ("eval", 0.2)):
        write(cache, [1, 2] if kind == "train1" else [1], kind, first=first)
    for kind, first, count in (("train", 0.5, 1), ("train1", 0.3, 2), ("eval", 0.2, 1)):
        reader = CacheReader(cache, kind)
        assert len(reader) == count
        assert equal(reader.read(key(1)), decode(blob(1, first=first), CODEBOOK))
    with pytest.raises(ValueError, match="kind of records 'best'; may be eval, train, train1"):
        write_shard(cache, "best", [key(1)], [blob(1)])


def test_missing_are_named_once_and_sorted(cache) -> None:
    reader = CacheReader(cache, "train")
    assert len(reader) == 0 and reader.missing([key(4), key(2)]) == [key(2), key(4)]
    assert key(2) not in reader and reader.bytes == 0 and reader.shards() == []
    write(cache, [2])
    reader = CacheReader(cache, "train")
    assert reader.missing([key(9), key(2), key(4), key(9)]) == [key(4), key(9)]
    assert reader.missing([]) == [] and reader.missing(iter([key(2)])) == []
    assert key(2) in reader and key(4) not in reader
    with pytest.raises(KeyError, match=f"{key(4).hex()} .* in the logit cache .*capture"):
        reader.read_many([key(2), key(4)])


def test_any_bytes_can_be_a_key(tmp_path) -> None:
    """Zeros at the end of a key are part of it, and bytes above 127 are not negative."""
    cache = open_cache(open_store(tmp_path), IDENTITY)
    publish_codebook(cache, "train", CODEBOOK)
    draw = random.Random(1)
    keys = {bytes(draw.choices([0, 0, 0, 1, 128, 255], k=16)) for _ in range(400)}
    keys |= {b"\0" * 16, b"\xff" * 16, b"\1" + b"\0" * 15}
    held, absent = sorted(keys)[::2], sorted(keys)[1::2]
    order = draw.sample(held, len(held))
    blobs = [blob(held.index(k)) for k in order]
    for part in range(3):
        write_shard(cache, "train", order[part::3], blobs[part::3])
    reader = CacheReader(cache, "train")
    assert reader.missing(draw.sample(sorted(keys), len(keys))) == absent
    assert [row.tobytes() for row in reader.keys] == held
    assert all(k in reader for k in held) and not any(k in reader for k in absent)
    assert all(number_of(reader.read(k)) == i for i, k in enumerate(held))
    with pytest.raises(ValueError, match="16 bytes"):
        reader.read(b"short")


def test_the_same_shard_twice_is_one(cache) -> None:
    name, size = write(cache, [1])
    assert write(cache, [1]) == (name, size)
    sizes = cache.sizes("shards")
    assert sizes.keys() == {f"{name}.bin", f"{name}.idx"}
    reader = CacheReader(cache, "train")
    assert reader.bytes == size == sum(sizes.values())
    (shard,) = reader.shards()
    assert (shard.name, shard.kind, shard.sequences, shard.bytes) == (name, "train", 1, size)


def test_of_two_records_of_a_sequence_every_reader_takes_the_same(cache) -> None:
    one, _ = write(cache, [1, 2], first=0.5)
    other, _ = write(cache, [2, 3], first=0.4)
    reader = CacheReader(cache, "train")
    assert len(reader) == 3 and [number_of(reader.read(key(n))) for n in (1, 2, 3)] == [1, 2, 3]
    served = 0.5 if one < other else 0.4
    assert equal(reader.read(key(2)), decode(blob(2, first=served), CODEBOOK))


def test_a_shard_without_its_index_is_not_there(cache) -> None:
    """A writer killed between the two objects leaves nothing that is read."""
    name, _ = write(cache, [1])
    cache.delete(f"shards/{name}.idx")
    assert len(CacheReader(cache, "train")) == 0
    write(cache, [1])
    assert len(CacheReader(cache, "train")) == 1


def test_what_does_not_fit_is_not_written(cache) -> None:
    publish_codebook(cache, "train", CODEBOOK)
    wrong = [
        ([key(1), key(2)], [blob(1)], "2 keys but 1 records"),
        ([], [], "a shard of 0 records"),
        ([key(1), key(1)], [blob(1), blob(1)], "twice"),
        ([b"short"], [blob(1)], "16 bytes"),
        ([key(1)], [b""], "empty"),
    ]
    for keys, blobs, why in wrong:
        with pytest.raises(ValueError, match=why):
            write_shard(cache, "train", keys, blobs)
    assert cache.list("shards") == []


def test_a_cache_that_is_removed_while_it_is_filled_is_told(cache) -> None:
    publish_codebook(cache, "eval", CODEBOOK)
    cache.delete("", recursive=True)
    with pytest.raises(ValueError) as error:
        write_shard(cache, "eval", [key(1)], [blob(1)], CODEBOOK)
    assert str(error.value) == (
        f"{cache.path('codebook-eval.bin')} is missing: the logit cache was removed while this "
        "capture ran; capture anew with: stillhouse run SPEC"
    )
    assert not cache.exists()


def test_the_first_codebook_stays_and_everybody_uses_it(cache) -> None:
    other = fit_codebook(CODING, [records(n, first=0.3) for n in range(9)])
    assert other.to_bytes() != CODEBOOK.to_bytes()
    assert read_codebook(cache, "train") is None
    assert publish_codebook(cache, "train", CODEBOOK).to_bytes() == CODEBOOK.to_bytes()
    assert publish_codebook(cache, "train1", other).to_bytes() == CODEBOOK.to_bytes()
    for kind in ("train", "train1", "train12"):
        found = read_codebook(cache, kind)
        assert found is not None and found.to_bytes() == CODEBOOK.to_bytes()
    assert read_codebook(cache, "eval") is None
    # Records made with a codebook that the cache does not have would be read as others.
    with pytest.raises(
        CacheMismatch, match="codebook-train.bin was replaced .*; capture again with: still"
    ):
        write_shard(cache, "train", [key(1)], [blob(1)], other)
    write_shard(cache, "train", [key(1)], [blob(1)], CODEBOOK)
    assert number_of(CacheReader(cache, "train").read(key(1))) == 1


def test_of_many_codebooks_at_once_one_wins(tmp_path) -> None:
    cache = open_cache(open_store(tmp_path), IDENTITY)
    start = threading.Barrier(5)
    books = [fit_codebook(CODING, [records(n, first=0.1 + 0.08 * n)]) for n in range(5)]

    def publish(book: Codebook) -> bytes:
        start.wait()
        return publish_codebook(cache, "train", book).to_bytes()

    with ThreadPoolExecutor(5) as pool:
        found = set(pool.map(publish, books))
    assert len(found) == 1 and found < {book.to_bytes() for book in books}


def test_a_reader_serves_many_threads(cache) -> None:
    for start in range(0, 40, 8):
        write(cache, range(start, start + 8))
    reader = CacheReader(cache, "train")

    def look(seed: int) -> bool:
        numbers = random.Random(seed).choices(range(40), k=12)
        found = reader.read_many([key(n) for n in numbers])
        return (found.ids[::6, 0] // 10).tolist() == numbers

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(24)))
    reader.close()


def test_remote_records_are_read_at_once_and_nothing_else_is(monkeypatch) -> None:
    """Fetching whole shards for a few of their records moves a hundred times the bytes."""
    cache = open_cache(open_store(f"memory://ranges-{os.getpid()}"), IDENTITY)
    write(cache, range(100))
    reader = CacheReader(cache, "train")
    real, asked, together = RemoteObjects.read_range, [], threading.Barrier(8)

    def read_range(self: RemoteObjects, path: str, start: int, stop: int) -> bytes:
        together.wait(timeout=120)  # passes only if eight requests are under way
        asked.append(stop - start)
        return real(self, path, start, stop)

    monkeypatch.setattr(RemoteObjects, "read_range", read_range)
    monkeypatch.setattr(RemoteObjects, "read", None)
    monkeypatch.setattr(RemoteObjects, "get", None)
    numbers = [3, 99, 41, 0, 7, 8, 9, 60]
    found = reader.read_many([key(n) for n in numbers])
    assert (found.ids[::6, 0] // 10).tolist() == numbers
    assert sorted(asked) == sorted(len(blob(n)) for n in numbers)
    reader.close()


def test_files_are_not_kept_open(tmp_path) -> None:
    """A cache has thousands of shards, and a process may open a thousand files."""
    cache = open_cache(open_store(tmp_path), IDENTITY)
    for number in range(30):
        write(cache, [number])
    reader = CacheReader(cache, "train")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(30):
        assert number_of(reader.read(key(number))) == number
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_million_sequences_open_in_little_time_and_memory(tmp_path) -> None:
    opened = measure(tmp_path)
    assert opened.sequences == 1_000_000
    assert opened.extra_bytes < 200e6
    keys = random.Random(0).randbytes(16_000_000)
    began = time.perf_counter()
    assert len({keys[at : at + 16] for at in range(0, len(keys), 16)}) == 1_000_000
    # Of what Python takes to put so many keys into a set: 1.4 times. See the bench for seconds.
    assert opened.seconds < 10 * (time.perf_counter() - began)


def test_the_index_takes_28_bytes_a_sequence_and_88_a_shard() -> None:
    def size(count: int) -> int:
        keys, rows = np.zeros((count, 16), np.uint8), np.ones(count, np.uint64)
        index = Index("train", "0" * 32, b"\0" * 16, 9, b"\0" * 16, keys, rows, rows)
        return len(pack(index))

    assert size(1001) - size(1) == 28_000 and size(1) == 88 + 28


def test_opening_again_finds_the_same_cache(store, cache) -> None:
    again = open_cache(store, dict(reversed(list(IDENTITY.items()))))
    assert again == cache
    assert store.list() == [fingerprint(IDENTITY)]


def test_a_cache_may_be_moved(tmp_path) -> None:
    """Whoever renames a folder, or copies it elsewhere, has not damaged it."""
    cache = open_cache(open_store(tmp_path), IDENTITY)
    write(cache, [1])
    (tmp_path / cache.name).rename(tmp_path / "mine")
    moved = open_store(tmp_path / "mine")
    write(moved, [2])
    reader = CacheReader(moved, "train")
    assert [number_of(reader.read(key(n))) for n in (1, 2)] == [1, 2]


@pytest.mark.parametrize("name", IDENTITY)
def test_every_part_of_the_identity_makes_another_cache(name) -> None:
    assert fingerprint({**IDENTITY, name: "other"}) != fingerprint(IDENTITY)


def test_a_wrong_cache_is_refused_with_the_difference(cache) -> None:
    check_identity(cache, IDENTITY)
    with pytest.raises(CacheMismatch) as error:
        check_identity(cache, {**IDENTITY, "teacher.name": "small"})
    assert "logit cache of another teacher.name: it has 'big', asked for 'small'" in str(
        error.value
    )
    assert cache.url in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith(f"; remove it with: stillhouse cache rm {cache.url}")
    with pytest.raises(CacheMismatch, match="another cache.positions"):
        check_identity(cache, {**IDENTITY, "cache.positions": None})


def test_a_folder_that_holds_another_identity_is_refused(store, cache) -> None:
    cache.write_json("identity.json", {**IDENTITY, "cache.k": 5})
    with pytest.raises(CacheMismatch, match="another cache.k: it has 5, asked for 4") as error:
        open_cache(store, IDENTITY)
    assert str(error.value).startswith(cache.path("identity.json"))
    assert str(error.value).endswith(f"; mend the cache with: stillhouse cache repair {cache.url}")


def test_names_do_not_depend_on_the_process() -> None:
    """Python's salted hash() as a key finds nothing in the next process."""
    code = f"from cluster.storage.keys import fingerprint as f; print(f({IDENTITY!r}))"
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == fingerprint(IDENTITY)


def test_a_shard_is_named_by_its_content(tmp_path) -> None:
    cache = open_cache(open_store(tmp_path), IDENTITY)
    name, _ = write(cache, [1])
    packed = cache.read_bytes(f"shards/{name}.idx")
    assert name == "train-" + hashlib.blake2b(packed, digest_size=16).hexdigest()
    data = cache.read_bytes(f"shards/{name}.bin")
    assert hashlib.blake2b(data, digest_size=16).digest() in packed and data == blob(1)
