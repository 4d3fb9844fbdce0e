"""The whole way from files to sequences, and back out of the store."""

from __future__ import annotations

import json
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest

from cluster.storage import Store, open_store
from trainer.corpus.corpus import Corpus, is_complete, open_corpus
from trainer.corpus.identity import corpus_identity
from trainer.corpus.prepare import prepare, serial
from trainer.corpus.size import check_size
from trainer.corpus.sources import resolve
from trainer.corpus.splits import merge, mix, scan
from trainer.corpus.tokenizer import load_tokenizer, train_tokenizer
from trainer.spec.sections import DataSpec, SourceSpec, TokenizerSpec

WORDS = [f"w{chr(97 + a)}{chr(97 + b)}" for a in range(9) for b in range(9)]
FILES, ROWS, LENGTH = 4, 60, 16


def text_of(number: int) -> str:
    words = random.Random(number)
    return f"d{number} " + " ".join(words.choices(WORDS, k=words.randint(1, 30)))


@pytest.fixture(scope="module")
def texts_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for file in range(FILES):
        rows = [{"text": text_of(ROWS * file + row)} for row in range(ROWS)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [text_of(number) for number in range(FILES * ROWS)]
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(train_tokenizer(texts, 330, folder))


def spec(folder: Path, **changes) -> DataSpec:
    settings = {
        "train": [
            SourceSpec(source=f"{folder}/[01].jsonl"),
            SourceSpec(source=f"{folder}/[23].jsonl", weight=2.0),
        ],
        "select_sequences": 5,
        "report_sequences": 7,
        "sequence_length": LENGTH,
    }
    return DataSpec(**{**settings, **changes})


def make(data: DataSpec, tokenizer, store: Store, each=serial) -> Corpus:
    prepare(data, tokenizer, store, each, identity=corpus_identity(data, {}))
    return open_corpus(store)


def documents_of(corpus: Corpus, part: str) -> list[list[list[int]]]:
    """Per sequence its pieces of documents, as ids without padding."""
    batch = corpus.part(part).batch(range(len(corpus.part(part))))
    pad = corpus.manifest["pad_id"]
    result = []
    for ids, positions in zip(batch.input_ids, batch.position_ids, strict=True):
        pieces = np.split(ids, np.flatnonzero(positions == 0)[1:])
        result.append([piece.tolist() for piece in pieces if piece[0] != pad])
    return result


def test_every_token_of_train_is_there_once_and_in_order(texts_folder, tokenizer, tmp_path):
    corpus = make(spec(texts_folder), tokenizer, open_store(tmp_path))
    first, found = 0, []
    for file in corpus.manifest["parts"]["train"]["files"]:
        last = first + file["sequences"]
        stream = [
            token
            for sequence in documents_of(corpus, "train")[first:last]
            for piece in sequence
            for token in piece
        ]
        # Every document is ended; only an end alone in the last sequence is nothing to learn from.
        texts = tokenizer.decode(stream).split("<|endoftext|>")
        found += texts[:-1] if texts[-1] == "" else texts
        first = last
    order = [int(text.split()[0][1:]) for text in found]
    assert order == sorted(order)  # files and rows in order
    assert all(text == text_of(number) for text, number in zip(found, order, strict=True))
    held_out = {
        int(number)
        for part in ("select", "report")
        for sequence in documents_of(corpus, part)
        for piece in sequence
        for number in re.findall(r"^d(\d+) ", tokenizer.decode(piece))  # where it begins
    }
    assert not held_out & set(order)
    assert held_out | set(order) == set(range(FILES * ROWS))


def test_parts_have_the_sequences_asked_for_and_no_padding(texts_folder, tokenizer, tmp_path):
    corpus = make(spec(texts_folder), tokenizer, open_store(tmp_path))
    assert len(corpus.part("select")) == 5 and len(corpus.part("report")) == 7
    for name in ("select", "report"):
        assert not (corpus.part(name).batch(range(5)).input_ids == tokenizer.pad_token_id).any()
    keys = {
        key.tobytes() for name in ("train", "select", "report") for key in corpus.part(name).keys
    }
    total = sum(len(corpus.part(name)) for name in ("train", "select", "report"))
    assert len(keys) == total


def test_a_batch_is_what_models_take(texts_folder, tokenizer, tmp_path) -> None:
    part = make(spec(texts_folder), tokenizer, open_store(tmp_path)).part("train")
    last = len(part) - 1
    batch = part.batch([last, 0, last])  # of several files, in any order
    assert batch.input_ids.shape == batch.position_ids.shape == (3, LENGTH)
    assert batch.input_ids.dtype == batch.position_ids.dtype == np.int64
    assert batch.loss_mask.dtype == np.float32 and batch.keys.shape == (3, 16)
    assert (batch.input_ids[0] == batch.input_ids[2]).all()
    assert batch.keys[1].tobytes() == part.keys[0].tobytes()
    assert batch.loss_mask.sum(axis=1).tolist() == part.loss_tokens[[last, 0, last]].tolist()
    assert (batch.loss_mask[:, :-1] <= (batch.position_ids[:, 1:] > 0)).all()
    assert part.sources[0] == 0 and part.sources[last] == 1
    assert part.sources.dtype == np.int16 and part.loss_tokens.dtype == np.int64
    assert len(part.batch([]).input_ids) == 0
    with pytest.raises(IndexError):
        part.batch([last + 1])
    with pytest.raises(IndexError):
        part.batch([-1])


def test_concat_counts_the_loss_across_documents(texts_folder, tokenizer, tmp_path) -> None:
    part = make(spec(texts_folder, packing="concat"), tokenizer, open_store(tmp_path)).part("train")
    batch = part.batch([0])
    assert batch.position_ids[0].tolist() == list(range(LENGTH))
    assert batch.loss_mask[0].tolist() == [1.0] * (LENGTH - 1) + [0.0]


def files_of(store: Store) -> dict[str, bytes]:
    return {name: store.read_bytes(name) for name in store.glob("**")}


def test_the_corpus_does_not_depend_on_the_order_or_place_of_tasks(
    texts_folder, tokenizer, tmp_path
) -> None:
    def backwards(function, calls):
        return [function(*pickle.loads(pickle.dumps(call))) for call in calls[::-1]][::-1]

    one, two = open_store(tmp_path / "1"), open_store(tmp_path / "2")
    make(spec(texts_folder), tokenizer, one)
    make(spec(texts_folder), tokenizer, two, backwards)
    assert files_of(one) == files_of(two)
    assert "manifest.json" in files_of(one) and "tokenizer/tokenizer.json" in files_of(one)


def test_the_store_may_be_remote(texts_folder, tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    here = make(spec(texts_folder), tokenizer, open_store(tmp_path / "here"))
    there = make(spec(texts_folder), tokenizer, open_store("memory://corpora/x"))
    assert there.manifest == here.manifest
    assert (there.part("train").keys == here.part("train").keys).all()
    assert load_tokenizer(there.tokenizer_folder()).get_vocab() == tokenizer.get_vocab()
    assert there.verify() == []


def test_verify_finds_damage(texts_folder, tokenizer, tmp_path) -> None:
    corpus = make(spec(texts_folder), tokenizer, open_store(tmp_path))
    assert corpus.verify() == []
    path = tmp_path / "select-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert corpus.verify() == ["select-00000.arrow"]


@pytest.mark.parametrize("guess", [5.0, 0.01])
def test_a_trained_tokenizer_sees_no_held_out_document(texts_folder, tmp_path, monkeypatch, guess):
    """Also when the first guess of what the held-out parts need was too small."""
    read: list[str] = []

    def spying(texts, vocab_size, folder):
        read[:] = list(texts)
        return train_tokenizer(read, vocab_size, folder)

    monkeypatch.setattr("trainer.corpus.tokenizer.train_tokenizer", spying)
    monkeypatch.setattr("trainer.corpus.prepare.BYTES_PER_TOKEN", guess)
    corpus = make(spec(texts_folder), TokenizerSpec(train=300), open_store(tmp_path))
    tokenizer = load_tokenizer(corpus.tokenizer_folder())
    assert corpus.manifest["vocab_size"] == 300 == len(tokenizer)
    assert len(corpus.part("select")) == 5 and len(corpus.part("report")) == 7
    held_out = "".join(
        tokenizer.decode(piece)
        for part in ("select", "report")
        for sequence in documents_of(corpus, part)
        for piece in sequence
    )
    shown = {word for word in held_out.replace("<|endoftext|>", " ").split() if word[0] == "d"}
    assert len(shown) > 5
    assert not shown & {text.split()[0] for text in read}
    assert len(read) > 100


def test_held_out_sequences_know_their_source(texts_folder, tokenizer, tmp_path) -> None:
    data = spec(texts_folder, select_sequences=40, report_sequences=40)
    corpus = make(data, tokenizer, open_store(tmp_path))
    texts = {number: text_of(number) + "<|endoftext|>" for number in range(FILES * ROWS)}
    for name in ("select", "report"):
        found = {0: 0, 1: 0}
        sequences = zip(documents_of(corpus, name), corpus.part(name).sources, strict=True)
        for (first, *_), source in sequences:
            piece = tokenizer.decode(first)
            possible = {int(n >= 2 * ROWS) for n, text in texts.items() if piece in text}
            if len(possible) == 1:
                assert possible == {source}
                found[int(source)] += 1
        assert min(found.values()) > 5


# ---------------------------------------------------------------- which documents


def write(folder: Path, texts: list[str]) -> SourceSpec:
    folder.mkdir(exist_ok=True)
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceSpec(source=str(path))


def test_equal_documents_are_kept_once_and_counted(tmp_path, tokenizer) -> None:
    first = write(tmp_path / "a", ["same", " same\n", "caf\u00e9", "one", ""])
    second = write(tmp_path / "b", ["cafe\u0301", "same", "two", "x" * 50])
    shards = resolve(first, 0) + resolve(second, 1)
    documents = merge([scan(shard, 2, 40) for shard in shards], seed=0)
    kept = set(zip(documents.shards.tolist(), documents.rows.tolist(), strict=True))
    assert kept == {(0, 0), (0, 2), (0, 3), (1, 2)}
    assert documents.read.tolist() == [5, 4]
    assert documents.duplicate.tolist() == [1, 2]
    assert documents.filtered.tolist() == [1, 1]
    assert [rows.tolist() for rows in documents.rows_by_shard(0)] == [[0, 2, 3], [2]]
    split = documents.rows_by_shard(0, 2), documents.rows_by_shard(2)
    both = [sorted([*a, *b]) for a, b in zip(*split, strict=True)]
    assert both == [[0, 2, 3], [2]]


def test_limits_are_in_characters(tmp_path) -> None:
    [shard] = resolve(write(tmp_path, ["äöü", "äöüß", "ä"]), 0)
    assert scan(shard, 3, 3).kept.tolist() == [True, False, False]
    assert scan(shard, 0, None).sizes.tolist() == [6, 8, 2]


def test_a_documents_place_depends_on_its_text_alone(tmp_path) -> None:
    """Adding documents moves none from train into report."""
    texts = [f"document {number}" for number in range(300)]
    [shard] = resolve(write(tmp_path, texts), 0)
    before = merge([scan(shard, 1, None)], seed=0)
    order = [texts[row] for row in before.rows]
    [shard] = resolve(write(tmp_path, texts[::-1] + ["a new one"]), 0)
    after = merge([scan(shard, 1, None)], seed=0)
    again = [(texts[::-1] + ["a new one"])[row] for row in after.rows]
    again.remove("a new one")
    assert again == order
    assert order != texts
    assert merge([scan(shard, 1, None)], seed=1).rows.tolist() != after.rows.tolist()


def test_mix_is_the_finalizer_of_splitmix64() -> None:
    """First outputs of SplitMix64 with seed 0, as in its reference implementation."""
    zero = np.zeros(1, np.uint64)
    assert int(mix(zero, 1)[0]) == 0xE220A8397B1DCDAF
    assert int(mix(zero, 2)[0]) == 0x6E789E6AA1B965F4


# ---------------------------------------------------------------- what is refused


def test_a_corpus_too_small_is_refused_with_the_numbers(texts_folder, tokenizer, tmp_path):
    data = spec(texts_folder, select_sequences=4000)
    with pytest.raises(ValueError, match=r"select_sequences \(4000\).*need 64,112 tokens") as e:
        make(data, tokenizer, open_store(tmp_path))
    assert "\n" not in str(e.value)
    assert not is_complete(open_store(tmp_path))
    with pytest.raises(ValueError, match="too small"):
        make(data, TokenizerSpec(train=300), open_store(tmp_path))
    with pytest.raises(ValueError, match="no document is left"):
        make(spec(texts_folder, min_chars=10**6), tokenizer, open_store(tmp_path))


def test_size_is_checked_before_a_cluster_starts(texts_folder, tokenizer, tmp_path) -> None:
    check_size(spec(texts_folder), tokenizer)
    check_size(spec(texts_folder), TokenizerSpec(train=300))
    for learner in (tokenizer, TokenizerSpec(train=2048)):
        with pytest.raises(ValueError, match="too small: data.select_sequences"):
            check_size(spec(texts_folder, select_sequences=4000), learner)
    with pytest.raises(ValueError, match="too small"):  # repeated documents count once
        repeated = write(tmp_path, ["the same again and again"] * 1000)
        check_size(spec(texts_folder, train=[repeated], select_sequences=20), tokenizer)
    with pytest.raises(ValueError, match="no column"):
        wrong = SourceSpec(source=f"{texts_folder}/*.jsonl", column="body")
        check_size(spec(texts_folder, train=[wrong]), tokenizer)


@pytest.mark.parametrize("count", range(20, 120, 20))
def test_the_check_never_refuses_what_would_do(texts_folder, tokenizer, tmp_path, count) -> None:
    data = spec(texts_folder, select_sequences=count, report_sequences=count)
    try:
        make(data, tokenizer, open_store(tmp_path))
    except ValueError:
        return
    check_size(data, tokenizer)


def test_character_limits_without_any_text_are_refused(tmp_path, tokenizer) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"input_ids": [1, 2]}\n')
    source = SourceSpec(source=str(path), format="input_ids")
    with pytest.raises(ValueError, match="remove them"):
        check_size(spec(tmp_path, train=[source], max_chars=5), tokenizer)


def test_token_ids_become_sequences_as_they_are(tmp_path, tokenizer) -> None:
    rows = [[5 + n % 100, 6, 7 + n // 100] for n in range(200)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    data = spec(tmp_path, train=[SourceSpec(source=str(path), format="input_ids")])
    corpus = make(data, tokenizer, open_store(tmp_path / "store"))
    ids = corpus.part("train").batch([0]).input_ids[0].tolist()
    assert ids[3] == corpus.manifest["eos_id"] and ids[:3] in rows


def test_opening_what_is_not_there_or_of_another_format(tmp_path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match="no finished corpus.*prepare"):
        open_corpus(store)
    store.write_json("manifest.json", {"format": 99})
    with pytest.raises(ValueError, match="format 99"):
        open_corpus(store)


def test_the_identity_follows_what_decides_the_sequences(texts_folder, tokenizer) -> None:
    base = corpus_identity(spec(texts_folder), {"content": "a"})
    assert all(value is None or isinstance(value, (str, int)) for value in base.values())
    same = spec(texts_folder, max_tokens=64)
    assert corpus_identity(same, {"content": "a"}) == base
    for change in ({"sequence_length": 32}, {"packing": "concat"}, {"min_chars": 3},
                   {"report_sequences": 8}):  # fmt: skip
        other = corpus_identity(spec(texts_folder, **change), {"content": "a"})
        assert other != base
    trained = corpus_identity(spec(texts_folder), {"train": 300})
    assert trained != base
