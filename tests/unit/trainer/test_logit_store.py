"""The logit cache on storage: shards, identities, and readers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cluster.storage import Store, open_store
from trainer.fingerprint import fingerprint
from trainer.logits.codec import Records
from trainer.logits.store import (
    CacheMismatch,
    CacheReader,
    check_identity,
    open_cache,
    write_shard,
)

IDENTITY = {"format": 1, "teacher.name": "big", "cache.k": 4, "cache.temperatures.0": 1.0}


def records(number: int, positions: int = 6, k: int = 4) -> Records:
    """Records that say which sequence they are of."""
    return Records(
        np.full((positions, k), number, np.int32),
        np.full((positions, k), -1.0, np.float32),
        np.full((positions, 1), -float(number), np.float32),
    )


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> Store:
    if request.param == "local":
        return open_store(tmp_path)
    return open_store(f"memory://logits-{tmp_path.name}-{id(tmp_path)}")


@pytest.fixture
def cache(store) -> Store:
    return open_cache(store, IDENTITY)


def shards(cache: Store) -> list[str]:
    return [name for name in cache.list("shards") if name.endswith(".json")]


def test_records_are_found_by_key_not_by_order(cache) -> None:
    """A cache keyed by the order of iteration gives other targets after a reshuffle."""
    write_shard(cache, "train", [key(3), key(1)], [records(3), records(1)])
    write_shard(cache, "train", [key(2)], [records(2)])
    reader = CacheReader(cache, "train")
    assert len(reader) == 3
    for number in (2, 3, 1, 3):
        assert (reader.read(key(number)).ids == number).all()


def test_sequences_may_be_of_different_lengths(cache) -> None:
    write_shard(cache, "train", [key(1), key(2)], [records(1, positions=3), records(2, k=9)])
    reader = CacheReader(cache, "train")
    assert reader.read(key(1)).ids.shape == (3, 4)
    assert reader.read(key(2)).ids.shape == (6, 9)


def test_kinds_are_kept_apart(cache) -> None:
    write_shard(cache, "train", [key(1)], [records(1)])
    write_shard(cache, "eval", [key(1)], [records(5)])
    assert (CacheReader(cache, "train").read(key(1)).ids == 1).all()
    assert (CacheReader(cache, "eval").read(key(1)).ids == 5).all()


def test_missing_are_named_once_and_sorted(cache) -> None:
    write_shard(cache, "train", [key(2)], [records(2)])
    reader = CacheReader(cache, "train")
    assert reader.missing([key(9), key(2), key(4), key(9)]) == [key(4), key(9)]
    assert key(2) in reader and key(4) not in reader
    with pytest.raises(KeyError, match=f"{key(4).hex()} is not in the logit cache .* run the capt"):
        reader.read(key(4))


def test_the_same_shard_twice_is_one(cache) -> None:
    assert write_shard(cache, "train", [key(1)], [records(1)]) == write_shard(
        cache, "train", [key(1)], [records(1)]
    )
    assert len(shards(cache)) == 1


def test_overlapping_shards_do_no_harm(cache) -> None:
    write_shard(cache, "train", [key(1), key(2)], [records(1), records(2)])
    write_shard(cache, "train", [key(2), key(3)], [records(2), records(3)])
    reader = CacheReader(cache, "train")
    assert len(reader) == 3
    assert [int(reader.read(key(n)).ids[0, 0]) for n in (1, 2, 3)] == [1, 2, 3]


def test_a_shard_without_its_index_is_not_there(cache) -> None:
    """A writer killed between the two objects leaves nothing that is read."""
    name, _ = write_shard(cache, "train", [key(1)], [records(1)])
    cache.delete(f"shards/{name}.json")
    assert len(CacheReader(cache, "train")) == 0
    write_shard(cache, "train", [key(1)], [records(1)])
    assert len(CacheReader(cache, "train")) == 1


def test_keys_and_records_must_be_equally_many(cache) -> None:
    with pytest.raises(ValueError, match="2 keys but 1 records"):
        write_shard(cache, "train", [key(1), key(2)], [records(1)])
    assert shards(cache) == []


def test_a_shard_of_another_format_is_refused(cache) -> None:
    name, _ = write_shard(cache, "train", [key(1)], [records(1)])
    index = cache.read_json(f"shards/{name}.json")
    cache.write_json(f"shards/{name}.json", {**index, "format": 99})
    with pytest.raises(ValueError, match=r"format 99, this version reads 1; capture it again"):
        CacheReader(cache, "train")


def test_opening_again_finds_the_same_cache(store, cache) -> None:
    again = open_cache(store, dict(reversed(list(IDENTITY.items()))))
    assert again == cache
    assert store.list() == [fingerprint(IDENTITY)]


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
    with pytest.raises(CacheMismatch, match="another cache.positions"):
        check_identity(cache, {**IDENTITY, "cache.positions": "loss"})


def test_a_folder_that_holds_another_identity_is_refused(store, cache) -> None:
    cache.write_json("identity.json", {**IDENTITY, "cache.k": 5})
    with pytest.raises(CacheMismatch, match="another cache.k: it has 5, asked for 4"):
        open_cache(store, IDENTITY)


def test_names_do_not_depend_on_the_process() -> None:
    """Python's salted hash() as a key finds nothing in the next process."""
    code = f"from trainer.fingerprint import fingerprint as f; print(f({IDENTITY!r}))"
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == fingerprint(IDENTITY)
