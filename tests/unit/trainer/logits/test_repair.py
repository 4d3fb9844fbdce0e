"""Files of a logit cache that are not what was written: found, named, mended, never believed."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.storage import Store, open_store
from trainer.logits import repair as damage_module
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import decode, encode
from trainer.logits.index import Index, checksum, digest, pack, shard_name, unpack
from trainer.logits.reader import CacheReader
from trainer.logits.records import Coding, Draws, Records
from trainer.logits.repair import Damage, check_cache, drop_shard, mend
from trainer.logits.store import (
    CacheDamaged,
    load_codebook,
    open_cache,
    publish_codebook,
    read_codebook,
    write_shard,
)

IDENTITY = {"format": 2, "teacher.name": "big"}
TRAIN = Coding("sample", vocab=300, k=6, temperatures=())
EVAL = Coding("exact", vocab=300, k=5)
POSITIONS = 4


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def draws(number: int) -> Draws:
    ids = np.random.default_rng(number).integers(0, 300, (POSITIONS, 6))
    return Draws(np.sort(ids, axis=1).astype(np.int32))


def exact(number: int) -> Records:
    draw = np.random.default_rng(number)
    ids = np.stack([draw.permutation(300)[:5] for _ in range(POSITIONS)]).astype(np.int64)
    log_probs = np.sort(draw.uniform(-9, -2, (POSITIONS, 5)), axis=1)[:, ::-1].astype(np.float32)
    scalars = draw.uniform(-3, 0, (3, POSITIONS)).astype(np.float32)
    return Records(ids, log_probs.copy(), scalars[0][:, None], -scalars[1], scalars[2])


BOOKS = {
    "train": fit_codebook(TRAIN, [draws(n) for n in range(8)]),
    "eval": fit_codebook(EVAL, [exact(n) for n in range(8)]),
}
MAKE: dict[str, Callable[[int], Records | Draws]] = {"train": draws, "eval": exact}


def truth(kind: str, number: int) -> Records:
    return decode(encode(MAKE[kind](number), BOOKS[kind]), BOOKS[kind])


def equal(one: Records, other: Records) -> bool:
    fields = ("ids", "log_probs", "log_tails", "entropy", "true_log_prob")
    both = [(getattr(one, name), getattr(other, name)) for name in fields]
    return all((a is b) or np.array_equal(a, b) for a, b in both)


def write(cache: Store, kind: str, numbers: range) -> str:
    blobs = [encode(MAKE[kind](n), BOOKS[kind]) for n in numbers]
    return write_shard(cache, kind, [key(n) for n in numbers], blobs, BOOKS[kind])[0]


class Made:
    """A cache of two train shards (sequences 0-4, 5-8) and one for evaluation (0-2)."""

    def __init__(self, root: Store) -> None:
        self.cache = open_cache(root, IDENTITY)
        for kind, book in BOOKS.items():
            publish_codebook(self.cache, kind, book)
        self.one = write(self.cache, "train", range(5))
        self.two = write(self.cache, "train", range(5, 9))
        self.eval = write(self.cache, "eval", range(3))
        self.numbers = {"train": range(9), "eval": range(3)}


@pytest.fixture(params=["local", "memory"])
def made(request, tmp_path) -> Made:
    local = request.param == "local"
    return Made(
        open_store(tmp_path if local else f"memory://hurt-{tmp_path.name}-{time.time_ns()}")
    )


def read_all(cache: Store) -> None:
    """Every sequence of the cache, each equal to what was written or an error."""
    for kind, numbers in (("train", range(9)), ("eval", range(3))):
        reader = CacheReader(cache, kind)
        for number in numbers:
            if key(number) in reader:
                assert equal(reader.read(key(number)), truth(kind, number))
            else:
                assert reader.missing([key(number)])
        reader.close()


def refused(cache: Store, path: str, why: str = "") -> None:
    with pytest.raises(CacheDamaged) as caught:
        read_all(cache)
    message = str(caught.value)
    assert message.startswith(f"{cache.path(path)} ") and why in message, message
    assert message.endswith(f"stillhouse cache repair {cache.url}") and "\n" not in message
    assert caught.value.path == path and caught.value.why in message
    copy = pickle.loads(pickle.dumps(caught.value))  # as it comes from another process
    assert str(copy) == message and copy.path == path


def mended(cache: Store, found: list[Damage], gone: dict[str, set[int]]) -> None:
    """Mending these leaves a sound cache that lacks these sequences and no others."""
    for item in found:
        mend(cache, item)
    assert check_cache(cache) == []
    read_all(cache)
    for kind, numbers in (("train", range(9)), ("eval", range(3))):
        absent = CacheReader(cache, kind).missing([key(n) for n in numbers])
        assert absent == [key(n) for n in sorted(gone.get(kind, set()))]


def rewrite(cache: Store, path: str, change: Callable[[bytes], bytes]) -> None:
    cache.write_bytes(path, change(cache.read_bytes(path)))


def swap(cache: Store, one: str, other: str) -> None:
    first, second = cache.read_bytes(one), cache.read_bytes(other)
    cache.write_bytes(one, second)
    cache.write_bytes(other, first)


def flip(place: float, bit: int = 3) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        at = int(place * len(data))
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

    return change


def test_a_sound_cache_has_no_damage(made) -> None:
    assert check_cache(made.cache) == []
    read_all(made.cache)


HURT: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-1],
    "halved": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "flipped at its start": flip(0),
    "flipped in its head": lambda data: data[:45] + bytes([data[45] ^ 16]) + data[46:],
    "flipped in the middle": flip(0.5),
    "flipped at its end": flip(0.9999),
    "longer": lambda data: data + b"\0",
    "another file": lambda data: b"PK\x03\x04" + data,
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("how", HURT)
def test_a_shard_that_changed(made, how: str, suffix: str) -> None:
    path = f"shards/{made.one}.{suffix}"
    rewrite(made.cache, path, HURT[how])
    refused(made.cache, path)
    (found,) = check_cache(made.cache)
    assert (found.path, found.kind, found.harmless) == (path, "train", False)
    if suffix == "bin":
        assert found.sequences == 5
    mended(made.cache, [found], {"train": set(range(5))})


def test_records_that_are_gone(made) -> None:
    made.cache.delete(f"shards/{made.one}.bin")
    refused(made.cache, f"shards/{made.one}.bin", "is missing")
    (found,) = check_cache(made.cache)
    assert (found.why, found.sequences) == ("is missing", 5)
    mended(made.cache, [found], {"train": set(range(5))})


def test_records_that_go_while_they_are_read(made) -> None:
    """A mapped file that is cut kills the process that reads it; this is an error as any."""
    reader = CacheReader(made.cache, "train")
    reader.read(key(0))
    rewrite(made.cache, f"shards/{made.one}.bin", lambda data: data[:3])
    with pytest.raises(CacheDamaged, match="is cut short in the record of sequence 0+ *0"):
        reader.read(key(0))
    if (folder := made.cache.local("shards")) is not None:  # in place, not replaced
        os.truncate(folder / f"{made.two}.bin", 0)
        with pytest.raises(CacheDamaged, match="is cut short"):
            reader.read(key(6))
    made.cache.delete(f"shards/{made.one}.bin")
    with pytest.raises(CacheDamaged, match="is missing"):
        reader.read_many([key(0), key(1)])


@pytest.mark.parametrize("suffix", ["bin", "idx", "both"])
def test_shards_that_were_exchanged(made, suffix: str) -> None:
    for part in ("bin", "idx") if suffix == "both" else (suffix,):
        swap(made.cache, f"shards/{made.one}.{part}", f"shards/{made.two}.{part}")
    first = min(made.one, made.two)
    refused(made.cache, f"shards/{first}.{'bin' if suffix == 'bin' else 'idx'}")
    found = check_cache(made.cache)
    assert len(found) == 2 and sum(item.sequences for item in found) == 9
    mended(made.cache, found, {"train": set(range(9))})


def test_records_that_were_exchanged_within_a_shard(made) -> None:
    """Equally long records of two sequences: each is whole, and belongs to the other."""
    reader = CacheReader(made.cache, "eval")
    path = f"shards/{made.eval}.bin"
    index = unpack(made.cache.read_bytes(f"shards/{made.eval}.idx"), made.eval)
    a, b = index.lengths[:2].tolist()
    rewrite(made.cache, path, lambda d: d[a : a + b] + d[:a] + d[a + b :])
    with pytest.raises(CacheDamaged, match="is damaged in the record of sequence"):
        reader.read(key(0))
    (found,) = check_cache(made.cache)
    assert found.why == "is damaged in 2 of its 3 records"
    mended(made.cache, [found], {"eval": {0, 1, 2}})


def test_shards_under_other_names(made) -> None:
    """The records of one kind under the name of another are another's targets."""
    other = made.eval.replace("eval-", "train-")
    for suffix in ("bin", "idx"):
        data = made.cache.read_bytes(f"shards/{made.eval}.{suffix}")
        made.cache.write_bytes(f"shards/{other}.{suffix}", data)
    refused(made.cache, f"shards/{other}.idx", "is of another kind of records than its name says")
    (found,) = check_cache(made.cache)
    mended(made.cache, [found], {})


def test_shards_and_codebooks_of_another_cache(made) -> None:
    parent = open_store(made.cache.url.rpartition("/")[0])
    other = Made.__new__(Made)
    other.cache = open_cache(parent, {**IDENTITY, "teacher.name": "small"})
    publish_codebook(other.cache, "train", BOOKS["train"])
    name = write(other.cache, "train", range(20, 22))
    for suffix in ("bin", "idx"):
        data = other.cache.read_bytes(f"shards/{name}.{suffix}")
        made.cache.write_bytes(f"shards/{name}.{suffix}", data)
    why = f"belongs to another logit cache, {other.cache.name}"
    refused(made.cache, f"shards/{name}.idx", why)
    (found,) = check_cache(made.cache)
    assert found.why == why and found.sequences == 2
    mended(made.cache, [found], {})

    made.cache.write_bytes("codebook-train.bin", other.cache.read_bytes("codebook-train.bin"))
    refused(made.cache, "codebook-train.bin", why)
    (found,) = check_cache(made.cache)
    mended(made.cache, [found], {})

    made.cache.write_bytes("identity.json", other.cache.read_bytes("identity.json"))
    (found,) = check_cache(made.cache)
    assert found.path == "identity.json" and other.cache.name in found.why


def forged(cache: Store, change: Callable[[bytearray], None]) -> str:
    """A shard whose index was changed by someone who knows how it is named."""
    book = load_codebook(cache, "train")
    assert book is not None
    blob = encode(draws(0), BOOKS["train"])
    keys = np.frombuffer(key(50) + key(51), np.uint8).reshape(2, 16)
    sums = np.array([checksum(key(50), blob), checksum(key(51), blob)], np.uint64)
    lengths = np.full(2, len(blob), np.uint32)
    sha = digest(blob, blob)
    index = Index("train", cache.name, book[0], 2 * len(blob), sha, keys, lengths, sums)
    data = bytearray(pack(index))
    change(data)
    name = shard_name("train", bytes(data))
    cache.write_bytes(f"shards/{name}.bin", 2 * blob)
    cache.write_bytes(f"shards/{name}.idx", bytes(data))
    return name


def no_rows(data: bytearray) -> None:
    del data[ROWS:]
    struct.pack_into("<2Q", data, COUNT, 0, 0)


def one_row_of_nothing(data: bytearray) -> None:
    (size,) = struct.unpack_from("<Q", data, SIZE)
    struct.pack_into("<2I", data, ROWS + 32, 0, size)


COUNT, SIZE, ROWS = 56, 64, 88  # where the header has them, and where it ends


def put(at: int, layout: str, *values: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(layout, data, at, *values)


@pytest.mark.parametrize(
    "change, why",
    [
        (put(COUNT, "<Q", 1 << 60), f"claims {1 << 60} records, which its 144 bytes do not hold"),
        (put(COUNT, "<Q", (1 << 64) - 1), "records, which its 144 bytes do not hold"),
        (put(COUNT, "<Q", 0), "claims 0 records"),
        (no_rows, "do not add up to the shard"),
        (one_row_of_nothing, "do not add up to the shard"),
        (put(SIZE, "<Q", 1 << 60), "do not add up to the shard"),
        (put(ROWS + 32, "<2I", 0, 80), "do not add up to the shard"),
        (put(ROWS + 32, "<2I", (1 << 32) - 1, (1 << 32) - 1), "do not add up to the shard"),
        (put(4, "<H", 9), "is of format 9, and this version reads 2"),
        (put(6, "<H", 32), "records, which its 144 bytes do not hold"),
        (put(8, "<4s", b"eval"), "is of another kind"),
        (put(0, "<4s", b"\0\0\0\0"), "is no index of a logit cache"),
        (put(40, "<Q", 7), "needs another codebook than codebook-train.bin"),
    ],
)
def test_an_index_with_absurd_numbers(made, change, why: str) -> None:
    name = forged(made.cache, change)
    tracemalloc.start()
    refused(made.cache, f"shards/{name}.idx", why)
    found = check_cache(made.cache)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert [item.path for item in found] == [f"shards/{name}.idx"]
    mended(made.cache, found, {})


def test_an_index_that_claims_what_its_records_have_not(made) -> None:
    """Sizes that agree with each other and not with the file: no buffer of that size is made."""

    def change(data: bytearray) -> None:
        struct.pack_into("<2I", data, ROWS + 32, (1 << 32) - 1, (1 << 32) - 1)
        struct.pack_into("<Q", data, SIZE, 2 * ((1 << 32) - 1))

    name = forged(made.cache, change)
    tracemalloc.start()
    refused(made.cache, f"shards/{name}.bin", "instead of 8589934590")
    found = check_cache(made.cache)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    mended(made.cache, found, {})


def test_an_index_too_large_to_be_one_is_not_read(tmp_path) -> None:
    made = Made(open_store(tmp_path))
    name = "train-" + "0" * 32
    path = tmp_path / made.cache.name / "shards" / name
    with open(f"{path}.idx", "wb") as file:
        file.truncate(1 << 40)
    path.with_suffix(".bin").write_bytes(b"x")
    tracemalloc.start()
    refused(made.cache, f"shards/{name}.idx", "more than any index of a logit cache")
    (found,) = check_cache(made.cache)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    mended(made.cache, [found], {})


def test_a_valid_checksum_over_what_is_no_record(made) -> None:
    """The store believes the bytes, the codec does not: the file is named all the same."""
    bad = b"\2\1\5\0" + b"\xff" * 40
    name, _ = write_shard(made.cache, "train", [key(70), key(71)], [bad, bad])
    for keys in ([key(70)], [key(1), key(71)]):
        with pytest.raises(CacheDamaged, match=f"{name}.bin holds no valid record of sequence"):
            CacheReader(made.cache, "train").read_many(keys)
    (found,) = check_cache(made.cache)  # so the repair that the error names has something to do
    assert (found.path, found.sequences) == (f"shards/{name}.bin", 2)
    assert found.why == "holds no valid record of 2 of its 2 sequences"
    mended(made.cache, [found], {})


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_every_record_is_decoded(made, monkeypatch, kind: str, piece: int) -> None:
    monkeypatch.setattr(damage_module, "PIECE_BYTES", piece)
    good = encode(MAKE[kind](60), BOOKS[kind])
    other = {"train": "eval", "eval": "train"}[kind]
    blobs = [good, good[:-4], encode(MAKE[other](61), BOOKS[other]), good]
    name, _ = write_shard(made.cache, kind, [key(n) for n in range(60, 64)], blobs)
    # A codebook that is lost too comes back from its spare copy, which the records are read with.
    for gone in ([], [f"codebook-{kind}.bin"]):
        for path in gone:
            made.cache.delete(path)
        found = {item.path: item for item in check_cache(made.cache)}
        assert list(found) == [*gone, f"shards/{name}.bin"]
        shard = found[f"shards/{name}.bin"]
        assert shard.why == "holds no valid record of 2 of its 4 sequences"
        assert (shard.kind, shard.sequences) == (kind, 4)
    mended(made.cache, list(found.values()), {})


@pytest.mark.parametrize("how", [*HURT, "deleted"])
def test_a_codebook_comes_back_from_its_spare_copy(made, how: str) -> None:
    path = "codebook-train.bin"
    if how == "deleted":
        made.cache.delete(path)
    else:
        rewrite(made.cache, path, HURT[how])
    refused(made.cache, path)
    if how != "deleted":
        with pytest.raises(CacheDamaged, match=path):
            read_codebook(made.cache, "train1")
        with pytest.raises(CacheDamaged, match=path):
            publish_codebook(made.cache, "train", BOOKS["train"])
    found = check_cache(made.cache)
    assert [(item.path, item.sequences) for item in found] == [(path, 0)]
    assert "spare copy is intact" in found[0].why
    mended(made.cache, found, {})


def test_without_any_codebook_its_shards_are_lost_and_no_others(made) -> None:
    (spare,) = (n for n in made.cache.list("codebooks") if n.startswith("train-"))
    rewrite(made.cache, f"codebooks/{spare}", flip(0.5))
    (found,) = check_cache(made.cache)
    assert found.harmless and found.path == f"codebooks/{spare}"
    read_all(made.cache)
    rewrite(made.cache, "codebook-train.bin", flip(0.5))
    found_all = check_cache(made.cache)
    assert [item.path for item in found_all] == [
        "codebook-train.bin",
        *sorted(f"shards/{name}.idx" for name in (made.one, made.two)),
    ]
    assert sum(item.sequences for item in found_all) == 9
    mended(made.cache, found_all, {"train": set(range(9))})
    # Another codebook may take its place now, and no record is left that it would misread.
    other = fit_codebook(TRAIN, [draws(n) for n in range(50, 53)])
    assert publish_codebook(made.cache, "train", other).to_bytes() == other.to_bytes()


def test_a_lost_spare_copy_is_written_again(made) -> None:
    (spare,) = (n for n in made.cache.list("codebooks") if n.startswith("eval-"))
    before = made.cache.read_bytes(f"codebooks/{spare}")
    made.cache.delete(f"codebooks/{spare}")
    (found,) = check_cache(made.cache)
    mended(made.cache, [found], {})
    assert made.cache.read_bytes(f"codebooks/{spare}") == before


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b'"x"', b"1" * 5000]
)
def test_an_identity_that_cannot_be_read(made, content: bytes) -> None:
    root = open_store(made.cache.url.rpartition("/")[0])
    made.cache.write_bytes("identity.json", content)
    with pytest.raises(CacheDamaged) as caught:
        open_cache(root, IDENTITY)
    assert str(caught.value).startswith(made.cache.path("identity.json") + " is damaged")
    assert f"stillhouse cache repair {made.cache.url}" in str(caught.value)
    assert "\n" not in str(caught.value)
    (found,) = check_cache(made.cache)
    assert (found.path, found.sequences) == ("identity.json", 0)
    mend(made.cache, found)
    open_cache(root, IDENTITY)  # as the next job does
    assert check_cache(made.cache) == []
    read_all(made.cache)


HUGE = 1 << 43


@pytest.mark.parametrize("path", ["identity.json", "codebook-train.bin", "codebooks/train"])
def test_a_huge_file_is_not_read(tmp_path, path: str) -> None:
    made = Made(open_store(tmp_path))
    if path == "codebooks/train":
        (name,) = (n for n in made.cache.list("codebooks") if n.startswith("train-"))
        path = f"codebooks/{name}"
    os.truncate(Path(made.cache.url, path), HUGE)
    tracemalloc.start()
    if path == "codebook-train.bin":
        refused(made.cache, path, f"has {HUGE} bytes")
    elif path == "identity.json":
        with pytest.raises(CacheDamaged, match=f"identity.json is damaged: it has {HUGE} bytes"):
            open_cache(open_store(tmp_path), IDENTITY)
    (found,) = check_cache(made.cache)
    assert found.path == path
    mend(made.cache, found)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    open_cache(open_store(tmp_path), IDENTITY)
    mended(made.cache, [], {})


def test_what_was_written_anew_since_it_was_found_damaged_stays(made) -> None:
    """Between finding and mending a user is asked, and a run may go on meanwhile."""
    hurt = {
        f"shards/{made.one}.bin": flip(0.5),
        f"shards/{made.two}.idx": flip(0.5),
        "codebook-eval.bin": flip(0.5),
        "identity.json": lambda data: b"{",
    }
    sound = {path: made.cache.read_bytes(path) for path in hurt}
    for path, change in hurt.items():
        rewrite(made.cache, path, change)
    found = check_cache(made.cache)
    assert {item.path for item in found} == set(hurt)
    for path, data in sound.items():
        made.cache.write_bytes(path, data)
    assert [mend(made.cache, item) for item in found] == [False] * len(found)
    mended(made.cache, [], {})
    made.cache.delete(f"shards/{made.one}.idx")
    made.cache.delete(f"shards/{made.one}.bin")
    gone = next(item for item in found if made.one in item.path)
    assert not mend(made.cache, gone)


def test_leftovers_that_were_finished_since_stay(tmp_path) -> None:
    made = Made(open_store(tmp_path))
    index = made.cache.read_bytes(f"shards/{made.one}.idx")
    path = tmp_path / made.cache.name / "shards" / f"{made.one}.bin"
    made.cache.delete(f"shards/{made.one}.idx")
    os.utime(path, (time.time() - 3700,) * 2)
    (found,) = check_cache(made.cache)
    made.cache.write_bytes(f"shards/{made.one}.bin", path.read_bytes())
    assert not mend(made.cache, found)  # its writer is at it again
    made.cache.write_bytes(f"shards/{made.one}.idx", index)
    os.utime(path, (time.time() - 3700,) * 2)
    assert not mend(made.cache, found)
    rewrite(made.cache, f"shards/{made.one}.bin", flip(0.5))
    assert not mend(made.cache, found)  # not what was found, nor what the user was asked about
    mended(made.cache, check_cache(made.cache), {"train": set(range(5))})


def test_a_moved_cache_without_identity_is_not_judged(tmp_path) -> None:
    """Nothing says what its shards should be of: dropping them all would be a guess."""
    made = Made(open_store(tmp_path))
    (tmp_path / made.cache.name).rename(tmp_path / "mine")
    moved = open_store(tmp_path / "mine")
    assert check_cache(moved) == []
    moved.write_bytes("identity.json", b"{")
    assert [item.path for item in check_cache(moved)] == ["identity.json"]
    moved.delete("identity.json")
    assert [item.path for item in check_cache(moved)] == ["identity.json"]


def test_what_a_killed_writer_leaves_is_unfinished_and_kept_for_an_hour(tmp_path) -> None:
    made = Made(open_store(tmp_path))
    made.cache.delete(f"shards/{made.one}.idx")
    read_all(made.cache)
    assert check_cache(made.cache) == []  # its writer may be about to write the index
    path = tmp_path / made.cache.name / "shards" / f"{made.one}.bin"
    os.utime(path, (time.time() - 3700,) * 2)
    (found,) = check_cache(made.cache)
    assert found.harmless and "unfinished" in found.why and found.sequences == 0
    mended(made.cache, [found], {"train": set(range(5))})
    assert not path.exists()


def test_a_stranger_among_the_shards(made) -> None:
    made.cache.write_bytes("shards/notes.txt", b"hello")
    made.cache.write_bytes("shards/train-1.bin", b"hello")
    found = check_cache(made.cache)
    assert [item.path for item in found] == ["shards/notes.txt", "shards/train-1.bin"]
    assert all(item.harmless for item in found)
    mended(made.cache, found, {})


def test_a_damaged_shard_is_refused_although_another_has_its_sequences(made) -> None:
    again = write(made.cache, "train", range(1, 7))
    rewrite(made.cache, f"shards/{again}.idx", flip(0.9))
    refused(made.cache, f"shards/{again}.idx")
    mended(made.cache, check_cache(made.cache), {})


def test_dropping_a_shard_takes_its_index_first(made, monkeypatch) -> None:
    """A reader that opens in between must not find an index without its records."""
    real, seen = type(made.cache).delete, []

    def delete(self: Store, path: str, recursive: bool = False) -> None:
        real(self, path, recursive)
        seen.append(path.rpartition(".")[2])
        read_all(self)

    monkeypatch.setattr(type(made.cache), "delete", delete)
    drop_shard(made.cache, made.one)
    drop_shard(made.cache, made.one)  # somebody else was faster
    assert seen == ["idx", "bin"]
    for name in ("../identity.json", "train-x", "", "codebook-train"):
        with pytest.raises(ValueError, match="is no shard"):
            drop_shard(made.cache, name)


def test_large_shards_are_checked_piece_by_piece(made, monkeypatch) -> None:
    """Whatever the pieces, every record's own checksum is looked at."""
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(damage_module, "PIECE_BYTES", size)
        assert check_cache(made.cache) == []
    index = unpack(made.cache.read_bytes(f"shards/{made.one}.idx"), made.one)
    starts = index.starts()

    def change(data: bytes) -> bytes:
        hurt = bytearray(data)
        hurt[starts[1]] ^= 1
        hurt[starts[4] - 1] ^= 1
        return bytes(hurt)

    rewrite(made.cache, f"shards/{made.one}.bin", change)
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(damage_module, "PIECE_BYTES", size)
        (found,) = check_cache(made.cache)
        assert found.why == "is damaged in 2 of its 5 records"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return Path(Made(open_store(tmp_path_factory.mktemp("sound"))).cache.url)


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_change_of_any_file_is_an_error_or_changes_nothing(sound, tmp_path_factory, data):
    target = tmp_path_factory.mktemp("changed") / sound.name
    shutil.copytree(sound, target)
    names = files_of(sound)
    for _ in range(data.draw(st.integers(1, 2), label="changes")):
        name = data.draw(st.sampled_from(names), label="file")
        path = target / name
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, max(len(content) - 1, 0)), label="byte")
        how = data.draw(st.sampled_from(["flip", "cut", "insert", "copy"]), label="how")
        if how == "flip" and content:
            content[at] ^= data.draw(st.integers(1, 255), label="bits")
        elif how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9), label="bytes")
        else:
            content = bytearray((sound / data.draw(st.sampled_from(names))).read_bytes())
        path.write_bytes(bytes(content))
    cache = open_store(target)
    try:
        read_all(cache)
        read = True
    except CacheDamaged as error:
        read = False
        assert "\n" not in str(error) and str(error).endswith(f"cache repair {cache.url}")
    found = check_cache(cache)
    harmless = all(item.harmless or item.path == "identity.json" for item in found)
    assert read == harmless  # what is read with wrong bytes around it is not called damaged
    for item in found:
        mend(cache, item)
    read_all(cache)
    assert all(item.path == "identity.json" for item in check_cache(cache))
    shutil.rmtree(target.parent)
