"""Tokenizers: training, loading, comparing, encoding."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.storage import open_store
from trainer.corpus.python_docs import documents, ranges
from trainer.corpus.tokenizer import (
    check_same_vocabulary,
    encode,
    load_tokenizer,
    pad_id,
    train_tokenizer,
    vocabulary_size,
)

TEXTS = list(documents(*ranges()[0]))[:12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(TEXTS, 320, tmp_path_factory.mktemp("tokenizer"))


def test_has_exactly_the_size_asked_for_and_loads_with_auto_tokenizer(folder) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 320 == vocabulary_size(tokenizer)
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 0
    assert tokenizer.pad_token_id == 1 == pad_id(tokenizer)
    assert tokenizer.bos_token is None
    text = "  odd  spacing\n\tÜmlaut 漢字 \U0001f600 ."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("salt", ["0", "7"])
def test_is_the_same_in_every_process(folder, tmp_path, salt) -> None:
    script = (
        "import sys; from pathlib import Path; "
        "from trainer.corpus.tokenizer import train_tokenizer; "
        "from trainer.corpus.python_docs import documents, ranges; "
        "train_tokenizer(list(documents(*ranges()[0]))[:12][::-1], 320, Path(sys.argv[1]))"
    )
    env = {**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, check=True)
    same = (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert same  # and the order of the texts does not matter


def test_a_corpus_too_small_for_the_vocabulary_says_what_it_reaches(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"tokenizer.train: got 5000; the corpus gives 2\d\d "
    ) as e:
        train_tokenizer(["to be or not to be"], 5000, tmp_path)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="need at least 258"):
        train_tokenizer(TEXTS, 257, tmp_path)


def test_encoding_equals_transformers_and_ends_every_document(folder) -> None:
    tokenizer = load_tokenizer(folder)
    texts = [text[:200] for text in TEXTS] * 60  # more than one batch
    encoded = encode(tokenizer, texts, "here")
    for text, ids in zip(texts[:20], encoded, strict=False):
        assert ids.tolist() == [*tokenizer(text)["input_ids"], 0]
        assert ids.dtype == np.int32
    assert len(encoded) == len(texts)


def test_token_ids_pass_through_and_are_checked(folder) -> None:
    tokenizer = load_tokenizer(folder)
    found = encode(tokenizer, [[5, 6], "a", [7, 0]], "here")
    assert [found[0].tolist(), found[2].tolist()] == [[5, 6, 0], [7, 0]]  # one end, not two
    with pytest.raises(ValueError, match="data.train.0: token id 320 is outside .* of 320"):
        encode(tokenizer, [[1, 320]], "data.train.0")
    with pytest.raises(ValueError, match="token id -1"):
        encode(tokenizer, [[-1]], "data.train.0")


def test_a_tokenizer_that_begins_texts_does_so_here(folder, tmp_path) -> None:
    """Some models answer nonsense without their first token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", 1)]
    )
    assert encode(tokenizer, ["ab"], "here")[0][0] == 1


def test_saved_truncation_and_padding_do_not_cut_documents(folder, tmp_path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    again = load_tokenizer(tmp_path)
    assert len(encode(again, [TEXTS[0]], "here")[0]) > 100
    assert encode(again, ["a"], "here")[0][-1] == 0
    ours, theirs = again.backend_tokenizer, load_tokenizer(folder).backend_tokenizer
    assert ours.to_str() == theirs.to_str()


def test_loads_from_the_url_of_a_folder_without_its_weights(folder, monkeypatch) -> None:
    store = open_store("memory://models/a")
    store.upload_folder(folder, "")
    store.write_bytes("model.safetensors", b"x" * 100)
    tokenizer = load_tokenizer("memory://models/a")
    assert tokenizer.get_vocab() == load_tokenizer(folder).get_vocab()


def test_loading_a_folder_calls_nobody(folder, monkeypatch) -> None:
    asked: list[str] = []

    def lookup(host, *rest, **more):
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    load_tokenizer(folder)
    assert asked == []


def test_a_missing_tokenizer_is_one_line(tmp_path) -> None:
    with pytest.raises(ValueError, match="no tokenizer in .*give a hub id") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_an_end_is_refused(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "t")
    config = json.loads((tmp_path / "t/tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no eos_token"):
        load_tokenizer(tmp_path / "t")


def test_same_vocabulary(folder, tmp_path) -> None:
    check_same_vocabulary(folder, shutil.copytree(folder, tmp_path / "same"))
    other = train_tokenizer(TEXTS, 330, tmp_path / "other")
    with pytest.raises(ValueError, match="330 and 320 tokens, 10 differ: .* in the teacher") as e:
        check_same_vocabulary(folder, other)
    assert "\n" not in str(e.value)


def test_a_vocabulary_of_the_same_size_with_two_ids_swapped_differs(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "t")
    state = json.loads((tmp_path / "t/tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    first, second = [token for token, number in vocab.items() if number in (300, 301)]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "t/tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="2 differ"):
        check_same_vocabulary(folder, tmp_path / "t")
