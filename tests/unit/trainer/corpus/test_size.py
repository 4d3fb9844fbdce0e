"""A corpus has about as many sequences of train as will be read, and not those of one place."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.storage import Store, open_store
from cluster.storage.keys import fingerprint
from trainer.corpus import packing as pack
from trainer.corpus.corpus import Corpus, existing_identity, open_corpus
from trainer.corpus.identity import corpus_identity, has_all
from trainer.corpus.prepare import prepare, serial, write_train
from trainer.corpus.splits import read_in_order
from trainer.corpus.tokenizer import load_tokenizer, train_tokenizer
from trainer.spec.sections import DataSpec, SourceSpec, TokenizerSpec

WORDS = [f"w{chr(97 + a)}{chr(97 + b)}" for a in range(9) for b in range(9)]
LENGTH, FILES, ROWS = 16, 4, 150


def text_of(number: int) -> str:
    words = random.Random(number)
    return f"d{number} " + " ".join(words.choices(WORDS, k=words.randint(1, 30)))


def write(folder: Path, numbers: Sequence[int]) -> Path:
    """The texts of `numbers`, dealt to files in their order."""
    folder.mkdir()
    for file, some in enumerate(np.array_split(np.array(numbers), FILES)):
        rows = [json.dumps({"text": text_of(int(number))}) for number in some]
        (folder / f"{file}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("corpus") / "texts", range(FILES * ROWS))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    every = [text_of(number) for number in range(FILES * ROWS)]
    return load_tokenizer(train_tokenizer(every, 330, tmp_path_factory.mktemp("tokenizer")))


def data_of(folder: Path, **changes: Any) -> DataSpec:
    sources = [SourceSpec(source=f"{folder}/*.jsonl")]
    sizes = {"select_sequences": 20, "report_sequences": 20, "sequence_length": LENGTH}
    return DataSpec(train=sources, **{**sizes, **changes})


def make(
    data: DataSpec, tokenizer: Any, store: Store, wanted: int | None, each: Any = serial
) -> Corpus:
    prepare(data, tokenizer, store, each, identity=corpus_identity(data, {}, wanted))
    return open_corpus(store)


def keys_by_file(corpus: Corpus) -> dict[str, list[bytes]]:
    """Sequence keys of train by the number of their shard."""
    keys, first, found = corpus.part("train").keys, 0, {}
    for file in corpus.manifest["parts"]["train"]["files"]:
        shard = file["name"].removesuffix(".arrow").rpartition("-")[2]
        last = first + file["sequences"]
        found[shard] = [key.tobytes() for key in keys[first:last]]
        first = last
    return found


def beginnings(corpus: Corpus, tokenizer: Any, part: str) -> set[int]:
    """The numbers of the documents that begin in a part, where they are not torn."""
    batch = corpus.part(part).batch(range(len(corpus.part(part))))
    found = set()
    for ids, positions in zip(batch.input_ids, batch.position_ids, strict=True):
        for piece in np.split(ids, np.flatnonzero(positions == 0)[1:]):
            name = re.match(r"d(\d+) ", tokenizer.decode(piece))
            found |= {int(name[1])} if name else set()
    return found


class Counted:
    """Maps like `serial`, and notes the documents that are tokenized for train."""

    def __init__(self) -> None:
        self.documents: list[int] = []  # of each try
        self.texts: set[Any] = set()

    def __call__(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        if function is write_train:
            self.documents.append(sum(len(call[2]) for call in calls))
            self.texts = {text for call in calls for text in read_in_order(call[0], call[2])}
        return serial(function, calls)


@pytest.mark.parametrize("packing", ["documents", "concat"])
def test_no_more_is_tokenized_than_will_be_read(
    texts: Path, tokenizer: Any, tmp_path: Path, packing: str
) -> None:
    data, counted = data_of(texts, packing=packing), Counted()
    whole = make(data, tokenizer, open_store(tmp_path / "all"), None)
    some = make(data, tokenizer, open_store(tmp_path / "some"), 100, counted)
    there, documents = len(whole.part("train")), whole.manifest["documents"]["kept"]
    assert there > 400
    assert 100 <= len(some.part("train")) < 130
    assert sum(counted.documents) < 0.4 * documents
    for part in ("select", "report"):
        assert (some.part(part).keys == whole.part(part).keys).all()
    assert not has_all(some.manifest) and has_all(whole.manifest)
    assert some.manifest["documents"] == whole.manifest["documents"]
    assert some.verify() == []


def test_no_document_is_in_two_parts(texts: Path, tokenizer: Any, tmp_path: Path) -> None:
    counted, data = Counted(), data_of(texts, select_sequences=60, report_sequences=60)
    corpus = make(data, tokenizer, open_store(tmp_path), 100, counted)
    parts = [beginnings(corpus, tokenizer, name) for name in ("select", "report")]
    parts.append({int(str(text).split()[0][1:]) for text in counted.texts})
    assert all(len(numbers) > 5 for numbers in parts)
    assert sum(map(len, parts)) == len(set().union(*parts))


def test_more_that_is_asked_for_is_added_behind_what_there_was(
    texts: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """So that a logit cache keeps what it has of them: it knows sequences by their keys."""
    data = data_of(texts)
    few = keys_by_file(make(data, tokenizer, open_store(tmp_path / "few"), 60))
    more = keys_by_file(make(data, tokenizer, open_store(tmp_path / "more"), 200))
    assert len(few) == FILES
    for shard, keys in few.items():
        assert keys[:-1] == more[shard][: len(keys) - 1]  # the last one was padded
        assert len(more[shard]) > len(keys)


def test_the_documents_do_not_depend_on_the_order_of_the_files(
    texts: Path, tokenizer: Any, tmp_path: Path
) -> None:
    numbers = list(range(FILES * ROWS))
    random.Random(1).shuffle(numbers)
    found = []
    for folder in (texts, write(tmp_path / "shuffled", numbers)):
        counted = Counted()
        make(data_of(folder), tokenizer, open_store(tmp_path / "s" / folder.name), 100, counted)
        found.append(counted.texts)
    assert found[0] == found[1]
    rows = sorted(int(str(text).split()[0][1:]) for text in found[0])
    tenth = FILES * ROWS // 10
    assert rows[0] < tenth and rows[-1] > 9 * tenth  # from everywhere


@pytest.mark.parametrize("wanted", [10**6, 700])
def test_where_all_documents_are_needed_they_stay_as_they_are(
    texts: Path, tokenizer: Any, tmp_path: Path, wanted: int
) -> None:
    whole = make(data_of(texts), tokenizer, open_store(tmp_path / "all"), None)
    assert len(whole.part("train")) * 0.8 < wanted
    found = make(data_of(texts), tokenizer, open_store(tmp_path / "found"), wanted)
    assert found.manifest["parts"] == whole.manifest["parts"]  # to the last byte
    assert has_all(found.manifest)


def test_an_estimate_that_was_too_low_is_made_good(
    texts: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pack.laid_tokens
    monkeypatch.setattr(pack, "laid_tokens", lambda documents, length: 8 * real(documents, length))
    counted, store = Counted(), open_store(tmp_path)
    corpus = make(data_of(texts), tokenizer, store, 100, counted)
    assert len(counted.documents) > 1 and counted.documents == sorted(counted.documents)
    assert 100 <= len(corpus.part("train")) < 250
    listed = {file["name"] for file in corpus.manifest["parts"]["train"]["files"]}
    assert {name for name in store.list() if name.startswith("train")} == listed


def test_a_tokenizer_that_is_trained_does_not_depend_on_it(texts: Path, tmp_path: Path) -> None:
    data = data_of(texts)
    found = [
        make(data, TokenizerSpec(train=300), open_store(tmp_path / str(wanted)), wanted)
        for wanted in (None, 50)
    ]
    assert (found[0].part("report").keys == found[1].part("report").keys).all()
    assert 50 <= len(found[1].part("train")) < len(found[0].part("train")) / 2


def test_another_number_is_another_corpus(texts: Path) -> None:
    names = {fingerprint(corpus_identity(data_of(texts), {}, wanted)) for wanted in (None, 1, 2)}
    assert len(names) == 3


def test_a_named_corpus_must_have_what_is_read(texts: Path, tokenizer: Any, tmp_path: Path) -> None:
    for wanted, most in ((60, 60), (None, 10**6)):
        store = open_store(tmp_path / str(wanted))
        identity = corpus_identity(data_of(texts), {}, wanted)
        prepare(data_of(texts), tokenizer, store, identity=identity)
        data = data_of(texts, corpus=fingerprint(identity))
        for asked in (None, 1, most):
            assert existing_identity(data, store, {}, asked) == identity
    data = data_of(texts, corpus=fingerprint(corpus_identity(data_of(texts), {}, 60)))
    with pytest.raises(ValueError, match=r"data\.corpus: .* 500 are read") as caught:
        existing_identity(data, open_store(tmp_path / "60"), {}, 500)
    assert "\n" not in str(caught.value)
