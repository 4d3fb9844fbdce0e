"""The capture's blocks, its codebooks, and the thread that encodes and publishes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.storage import Store, open_store
from tests.fixtures.corpora import LENGTH, VOCAB, data_spec, make_corpus, write_texts
from tests.fixtures.waiting import Clock, until
from trainer.logits.reader import CacheReader
from trainer.logits.records import coding_of
from trainer.logits.store import read_codebook
from trainer.spec.sections import CacheSpec, DistillSpec, TeacherSpec
from trainer.teacher import writer
from trainer.teacher import writer as codebooks
from trainer.teacher.job import (
    Block,
    Capture,
    Work,
    batch_size,
    blocks,
    count_wanted,
    deal,
    missing,
    pending_work,
    wanted,
)
from trainer.teacher.writer import Codebooks, Made, Writer
from trainer.worker import Hooks

DRAWS = 6
SIZE = 4


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Store:
    """A corpus whose sequences have one document or several, and one that grew from it."""
    root = tmp_path_factory.mktemp("blocks")
    store = open_store(root)
    texts = write_texts(root / "texts")
    corpus = make_corpus(store.sub("small"), data_spec(texts))
    from trainer.corpus.tokenizer import load_tokenizer

    texts = write_texts(root / "texts", documents=60, seed=1)
    make_corpus(store.sub("grown"), data_spec(texts), load_tokenizer(corpus.tokenizer_folder()))
    return store


def open_(job: Capture) -> Any:
    from trainer.corpus.corpus import open_corpus

    return open_corpus(job.corpus)


@pytest.fixture
def job(corpora, tmp_path) -> Capture:
    return Capture(
        teacher=TeacherSpec(model="nowhere"),
        cache_spec=CacheSpec(draws=DRAWS, redraws=2),
        data=data_spec("unused").model_copy(update={"max_tokens": 80 * LENGTH}),
        distill=DistillSpec(steps=20, tokens_per_step=8 * LENGTH),
        seed=3,
        batch_tokens=SIZE * LENGTH,
        shard_seconds=100.0,
        corpus=corpora.sub("small"),
        cache=open_store(tmp_path).sub("cache"),
    )


def keys_of(job: Capture, work: Work) -> list[bytes]:
    part = open_(job).part(work.part)
    return [part.keys[i].tobytes() for i in work.numbers]


def results_of(keys: list[bytes], sets: int) -> tuple[torch.Tensor, ...]:
    """What a forward pass might give: draws that are a function of the sequence key."""
    ids = [
        np.random.default_rng([*key, s]).integers(0, VOCAB, (LENGTH, DRAWS))
        for key in keys
        for s in range(sets)
    ]
    drawn = np.sort(np.stack(ids), axis=-1).reshape(len(keys), sets, LENGTH, DRAWS)
    drawn = drawn.transpose(0, 2, 1, 3).reshape(-1, sets, DRAWS)
    usable = torch.ones(len(keys) * LENGTH, dtype=torch.bool)
    return usable, torch.from_numpy(drawn.astype(np.int32))


def made_of(job: Capture, block: Block) -> Made:
    return made_of_size(job, block, SIZE)


def made_of_size(job: Capture, block: Block, size: int) -> Made:
    part = open_(job).part(block.work.part)
    keys = [part.keys[i].tobytes() for i in block.numbers]
    full = [part.keys[i].tobytes() for i in block.filled(size)]
    coding = coding_of(job.cache_spec, VOCAB, block.work.family)
    kinds = np.flatnonzero(block.lacks.any(axis=0)).tolist()
    captured = np.ones((size, LENGTH), bool)
    return Made(block, keys, captured, coding, kinds, results_of(full, len(kinds)), lambda: None)


def train_blocks(job: Capture) -> list[Block]:
    works = [w for w in pending_work(job, open_(job)) if w.family == "train"]
    return list(blocks(works, SIZE))


@dataclass
class Started:
    """A writer and what was asked of its fence."""

    writer: Writer
    fences: list[float]


def start(job: Capture, seconds: float = 100.0, **hooks: Callable[..., Any]) -> Started:
    fences: list[float] = []
    hooks.setdefault("fence", lambda: fences.append(time.monotonic()))
    made = Hooks(**hooks)  # type: ignore[arg-type]
    books = Codebooks(job, open_(job), VOCAB, made)
    return Started(Writer(job.cache, books, made.fence, seconds), fences)


def put_all(job: Capture, started: Started, some: list[Block]) -> None:
    with started.writer as at_work:
        for block in some:
            at_work.reserve()
            at_work.put(made_of(job, block))


def no_writer() -> bool:
    """Whether the threads of all writers have ended."""
    return not any(thread.name == "cache-writer" for thread in threading.enumerate())


def shards(job: Capture) -> list[str]:
    return [name for name in job.cache.list("shards") if name.endswith(".idx")]


# Blocks.


def test_blocks_hold_everything_wanted_once_and_one_kind_of_sequence_each(job) -> None:
    corpus = open_(job)
    works = pending_work(job, corpus)
    assert [work.part for work in works] == sorted(
        (work.part for work in works), key=("select", "report", "train").index
    )
    kinds_seen = set()
    for name in ("train", "select", "report"):
        part = corpus.part(name)
        mine = [block for block in blocks(works, SIZE) if block.work.part == name]
        numbers = np.concatenate([block.numbers for block in mine])
        asked = next(some for kind, of, some in wanted(job, corpus) if of is part)
        assert sorted(numbers.tolist()) == sorted(asked)
        for block in mine:
            positions = part.batch(block.numbers).position_ids
            several = (positions[:, 1:] == 0).any(axis=1)
            assert several.all() or not several.any()
            kinds_seen.add(bool(several[0]))
            keys = [part.keys[i].tobytes() for i in block.numbers]
            assert keys == sorted(keys) and block.lacks.all()
            assert set(block.filled(SIZE)) == set(block.numbers)
            assert len(block.filled(SIZE)) == SIZE
        ragged = [block for block in mine if len(block.numbers) < SIZE]
        assert len(ragged) <= 2  # one for each kind of sequence
    assert kinds_seen == {True, False}
    firsts = [block for block in blocks(works, SIZE) if block.fits]
    assert [block.work.family for block in firsts] == ["eval", "train"]
    assert [len(block.numbers) for block in firsts] == [SIZE, SIZE]
    assert batch_size(job, 1, "cpu") == SIZE and count_wanted(job, corpus) == 96


def test_what_is_left_after_some_blocks_are_the_other_blocks(job) -> None:
    """Whichever they were: the next capture has the same ones, sequence for sequence."""
    every = [tuple(block.numbers) for block in train_blocks(job)]
    done = train_blocks(job)[1::3]
    put_all(job, start(job), [replace(done[0], sample=True, fits=True), *done[1:]])
    left = [tuple(block.numbers) for block in train_blocks(job)]
    assert set(left) == set(every) - {tuple(block.numbers) for block in done}
    assert len(left) == len(every) - len(done) > 5


def test_a_corpus_that_grew_needs_few_more_forward_passes_than_it_has_new_batches(
    job, corpora
) -> None:
    put_all(job, start(job), train_blocks(job))
    grown = replace(job, corpus=corpora.sub("grown"))
    left = train_blocks(grown)
    new = sum(len(block.numbers) for block in left)
    absent = next(numbers for kind, _, numbers in missing(grown, open_(grown)) if kind == "train")
    assert new == len(absent) > 0
    assert len(left) <= -(-new // SIZE) + 4


def test_a_block_knows_which_set_of_draws_each_sequence_lacks(job) -> None:
    one = replace(job, cache_spec=CacheSpec(draws=DRAWS))
    some = train_blocks(one)[:3]
    halves = [replace(b, numbers=b.numbers[1:3], lacks=b.lacks[1:3]) for b in some]
    put_all(one, start(one), halves)
    done = {
        int(i)
        for work in pending_work(job, open_(job))
        if work.family == "train"
        for i, lacks in zip(work.numbers, work.lacks, strict=True)
        if not lacks[work.kinds.index("train")]
    }
    assert len(done) == 3 * 2
    for work in pending_work(job, open_(job)):
        if work.family == "train":
            assert work.kinds == ("train", "train1")
            assert work.lacks[:, 1].all()
    put_all(job, start(job), train_blocks(job))
    assert train_blocks(job) == []
    for kind in ("train", "train1"):
        assert sum(shard.sequences for shard in CacheReader(job.cache, kind).shards()) == 80


# The writer.


def test_records_of_some_positions_are_told_apart_by_the_positions(job) -> None:
    block = train_blocks(job)[0]
    made = made_of(job, block)
    captured = np.random.default_rng(5).random((SIZE, LENGTH)) < 0.3
    captured[:, 3] = True  # none of a sequence is not asked for
    places = np.flatnonzero(captured)
    fewer = replace(made, captured=captured, results=tuple(v[places] for v in made.results))
    for whole, some in zip(made.records(), fewer.records(), strict=True):
        for sequence, (every, few) in enumerate(zip(whole, some, strict=True)):
            assert np.array_equal(few.ids, every.ids[captured[sequence]])
    number = 4 + int(np.flatnonzero(captured[1][4:])[0])  # a position of the second sequence
    place = int(captured[0].sum() + captured[1][:number].sum())
    fewer.results[0][place] = False
    key = made.keys[1].hex()
    with pytest.raises(ValueError, match=f"NaN .* at position {number} of sequence {key}"):
        fewer.records()


def test_records_are_stored_under_their_keys(job) -> None:
    """Of every set of draws; the repeats that fill a block up are not."""
    started = start(job)
    put_all(job, started, train_blocks(job))
    assert len(started.fences) == 3  # the codebook, and a shard of each kind
    for redraw, kind in enumerate(("train", "train1")):
        with CacheReader(job.cache, kind) as reader:
            assert len(reader) == 80
            for block in train_blocks(replace(job, cache=job.cache.sub("none")))[::4]:
                for key in keys_of(job, Work(block.work.part, ("train",), block.numbers, None)):  # type: ignore[arg-type]
                    found = reader.read(key)
                    drawn = results_of([key], 2)[1][:, redraw].numpy()
                    for t in range(LENGTH):
                        ids, counts = np.unique(drawn[t], return_counts=True)
                        held = found.log_probs[t] > -np.inf
                        order = np.argsort(found.ids[t][held])
                        assert found.ids[t][held][order].tolist() == ids.tolist()
                        shares = np.exp(found.log_probs[t][held][order]) * DRAWS
                        np.testing.assert_allclose(shares, counts, rtol=1e-5)
    total = sum(job.cache.size(f"shards/{name}") for name in job.cache.list("shards"))
    assert started.writer.bytes == {"train": total}
    assert started.writer.positions == {"train": 2 * 80 * LENGTH}


def test_shards_are_published_by_time_also_while_nothing_comes(job) -> None:
    started = start(job, seconds=0.2)
    with started.writer as at_work:
        at_work.reserve()
        at_work.put(made_of(job, train_blocks(job)[0]))
        until(lambda: len(shards(job)) == 2)


def test_shards_are_published_by_size(job, monkeypatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 3000)
    some = train_blocks(job)
    put_all(job, start(job), some)
    assert 4 < len(shards(job)) < 2 * len(some)


def test_no_more_than_two_batches_are_on_the_host(job, monkeypatch) -> None:
    """While the thread encodes one, room is given for one more and no further."""
    clock = Clock()
    monkeypatch.setattr(writer, "time", clock)
    go, encoding = threading.Event(), threading.Event()
    plain = writer.encode

    def slow(item: Any, book: Any) -> bytes:
        encoding.set()
        assert go.wait(60)
        return plain(item, book)

    monkeypatch.setattr(writer, "encode", slow)
    some = train_blocks(job)
    started = start(job)
    with started.writer as at_work:
        for block in some[:2]:
            at_work.reserve()
            at_work.put(made_of(job, block))
        assert encoding.wait(60)
        waiting = threading.Thread(target=at_work.reserve, name="forward")
        waiting.start()
        until(lambda: clock.looks.get("forward") == 1)  # it waits
        clock.now += 7
        waiting.join(0.3)
        assert waiting.is_alive()
        go.set()
        waiting.join(60)
        assert not waiting.is_alive()
        at_work.put(made_of(job, some[2]))
    assert started.writer.wait_s == 7
    assert len(CacheReader(job.cache, "train")) == 3 * SIZE


@pytest.mark.parametrize("where", ["fence", "encode", "publish"])
def test_an_error_of_the_thread_surfaces_at_the_next_batch(job, monkeypatch, where) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("no space left")

    hooks = {"fence": fail} if where == "fence" else {}
    if where == "encode":
        monkeypatch.setattr(writer, "encode", fail)
    if where == "publish":
        monkeypatch.setattr(writer, "write_shard", fail)
    started = start(job, seconds=0.0, **hooks)
    some = train_blocks(job)
    put = 0
    with pytest.raises(OSError, match="no space left"), started.writer as at_work:
        for _ in range(100):
            at_work.reserve()
            at_work.put(made_of(job, some[0]))
            put += 1
            until(no_writer)
    assert put == 1
    assert shards(job) == []


def test_an_error_at_the_end_is_not_lost(job, monkeypatch) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(writer, "write_shard", fail)
    with pytest.raises(OSError, match="no space left"):
        put_all(job, start(job), train_blocks(job)[:1])


def test_an_error_of_the_forward_passes_ends_the_thread_without_publishing(job) -> None:
    started = start(job)
    with pytest.raises(ZeroDivisionError), started.writer as at_work:
        at_work.reserve()
        at_work.put(made_of(job, train_blocks(job)[0]))
        raise ZeroDivisionError
    assert shards(job) == [] and no_writer()


def test_logits_that_are_no_numbers_name_the_sequence(job) -> None:
    block = train_blocks(job)[0]
    made = made_of(job, block)
    made.results[0][2 * LENGTH + 5] = False
    started = start(job)
    with pytest.raises(ValueError, match="NaN") as caught, started.writer as at_work:
        at_work.reserve()
        at_work.put(made)
    text = str(caught.value)
    assert made.keys[2].hex() in text and "position 5" in text and "\n" not in text
    # What fills a block up does not count.
    ragged = next(b for b in train_blocks(job) if len(b.numbers) < SIZE)
    made = made_of(job, replace(ragged, sample=True, fits=True))
    made.results[0][-1] = False
    put_all(job, start(job), [])
    assert len(made.records()[0]) == len(ragged.numbers)


# Codebooks.


def test_one_rank_fits_and_the_others_wait(job, monkeypatch) -> None:
    """Batches that came before there was a codebook wait, and are stored in the end."""
    monkeypatch.setattr(codebooks, "POLL_SECONDS", 0.05)
    clock = Clock()
    monkeypatch.setattr(writer, "time", clock)
    some = train_blocks(job)
    second = start(job)
    other = threading.Thread(target=put_all, args=(job, second, some[1::2]), name="other")
    other.start()
    # There is room for two batches; it waits for that of the third.
    until(lambda: clock.looks.get("other") == 2 * writer.BATCHES + 1)
    clock.now += 7
    assert other.is_alive() and read_codebook(job.cache, "train") is None
    put_all(job, start(job), some[0::2])
    other.join(60)
    assert not other.is_alive()
    assert len(CacheReader(job.cache, "train")) == 80
    assert second.writer.wait_s == 7 and not second.writer.gave_up


def test_a_codebook_that_never_comes_is_an_error(job, monkeypatch) -> None:
    monkeypatch.setattr(codebooks, "WAIT_SECONDS", 0.3)
    monkeypatch.setattr(codebooks, "POLL_SECONDS", 0.05)
    with pytest.raises(TimeoutError, match="no codebook for train") as caught:
        put_all(job, start(job), train_blocks(job)[1:2])
    assert "\n" not in str(caught.value) and job.cache.url in str(caught.value)


@pytest.mark.timeout(120)  # it would wait for half an hour
def test_an_error_while_the_thread_waits_for_a_codebook_is_not_held_back(job) -> None:
    started = start(job)
    with pytest.raises(ZeroDivisionError), started.writer as at_work:
        at_work.reserve()
        at_work.put(made_of(job, train_blocks(job)[1]))
        raise ZeroDivisionError
    assert shards(job) == [] and no_writer()


def test_a_stop_before_there_is_a_codebook_loses_the_batches_and_says_so(job, monkeypatch) -> None:
    monkeypatch.setattr(codebooks, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(codebooks, "POLL_SECONDS", 0.05)
    started = start(job, stop_requested=lambda: True)
    put_all(job, started, train_blocks(job)[1:4])
    assert started.writer.gave_up and shards(job) == []


def test_the_codebook_counts_the_ids_of_the_wanted_sequences(job, monkeypatch) -> None:
    """All of them, or so many of them evenly over the keys; without remap none."""
    corpus = open_(job)
    seen: list[Any] = []
    plain = codebooks.fit_codebook

    def spy(coding: Any, sample: Any, counts: Any = None) -> Any:
        seen.append(counts)
        return plain(coding, sample, counts)

    monkeypatch.setattr(codebooks, "fit_codebook", spy)
    items = made_of(job, train_blocks(job)[0]).records()[0]
    part = corpus.part("train")
    numbers = next(some for kind, _, some in wanted(job, corpus) if kind == "train")
    for number, (remap, most) in enumerate((("frequency", 4096), ("frequency", 5), ("none", 9))):
        monkeypatch.setattr(codebooks, "COUNTED", most)
        spec = CacheSpec(draws=DRAWS, redraws=2, remap=remap)
        mine = replace(job, cache_spec=spec, cache=job.cache.sub(str(number)))
        Codebooks(mine, corpus, VOCAB, Hooks()).get("train", items)
    truth = np.bincount(part.batch(numbers).input_ids.ravel(), minlength=VOCAB)
    assert (seen[0] == truth).all()
    ordered = sorted(numbers, key=lambda i: part.keys[i].tobytes())
    few = [ordered[round(at)] for at in (0, 79 / 4 - 0.5, 79 / 2 - 0.5, 59, 79)]
    assert seen[1].sum() == 5 * LENGTH
    assert (seen[1] <= truth).all()
    assert (seen[1] == np.bincount(part.batch(few).input_ids.ravel(), minlength=VOCAB)).all()
    assert seen[2] is None


def test_a_codebook_of_other_settings_is_refused(job) -> None:
    put_all(job, start(job), train_blocks(job)[:1])
    other = replace(job, cache_spec=CacheSpec(draws=DRAWS + 1))
    with pytest.raises(ValueError, match="codebook for train") as caught:
        Codebooks(other, open_(job), VOCAB, Hooks()).get("train", None)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_published_is_whole(job, tmp_path: Path) -> None:
    put_all(job, start(job), train_blocks(job))
    names = job.cache.list("shards")
    assert len(names) == 4 and {Path(name).suffix for name in names} == {".bin", ".idx"}


def test_small_blocks_share_one_sample_for_the_codebook(job, corpora, tmp_path: Path) -> None:
    """As if they were one block: the same codebook, and every record is there."""
    whole = replace(job, cache=open_store(tmp_path).sub("whole"))
    works = [work for work in pending_work(job, open_(job)) if work.family == "train"]
    small = list(blocks(works, SIZE, sample=3))
    assert [(block.sample, block.fits) for block in small[:4]] == [
        (True, False),
        (True, False),
        (True, True),
        (False, False),
    ]
    put_all(job, start(job), small)
    assert train_blocks(job) == []
    three = np.concatenate([block.numbers for block in small[:3]])
    lacks = np.concatenate([block.lacks for block in small[:3]])
    large = replace(small[0], numbers=three, lacks=lacks, sample=True, fits=True)
    with start(whole).writer as at_work:
        at_work.reserve()
        at_work.put(made_of_size(whole, large, 3 * SIZE))
    mine, others = (read_codebook(one.cache, "train") for one in (job, whole))
    assert mine is not None and others is not None
    assert (mine.freqs == others.freqs).all() and (mine.centroids == others.centroids).all()


def test_a_stop_before_the_sample_is_whole_leaves_its_sequences_to_the_next(job) -> None:
    works = [work for work in pending_work(job, open_(job)) if work.family == "train"]
    small = list(blocks(works, SIZE, sample=3))
    started = start(job)
    put_all(job, started, small[:2])
    assert started.writer.gave_up and read_codebook(job.cache, "train") is None
    put_all(job, start(job), list(blocks(works, SIZE, sample=3)))
    assert train_blocks(job) == []


def ids(hands: list[list[Block]]) -> list[list[int]]:
    return [[id(block) for block in hand] for hand in hands]


def test_blocks_are_dealt_evenly_and_samples_to_one_rank(job) -> None:
    works = pending_work(job, open_(job))
    alone = list(blocks(works, SIZE))
    assert ids(deal(alone, 3)) == ids([alone[rank::3] for rank in range(3)])
    every = list(blocks(works, SIZE, sample=3))
    hands = deal(every, 2)
    assert sorted(sum(ids(hands), [])) == sorted(ids([every])[0])
    assert abs(len(hands[0]) - len(hands[1])) <= 1
    for family in ("eval", "train"):
        assert (
            len(
                [
                    hand
                    for hand in hands
                    if any(block.sample and block.work.family == family for block in hand)
                ]
            )
            == 1
        )
