"""Codebooks: stored and read, sound or refused; their codes near the entropy."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.logits.codebook import Codebook
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import encode
from trainer.logits.contexts import STATE_OF, TAIL
from trainer.logits.encoder import event
from trainer.logits.rans import (
    ESCAPE,
    PRECISION,
    SYMBOLS,
    check_frequencies,
    code_table,
    frequencies,
    pack,
)
from trainer.logits.records import Coding, Draws


def example(seed: int = 0) -> tuple[Draws, Codebook]:
    rng = np.random.default_rng(seed)
    item = Draws(np.sort(rng.integers(0, 500, (200, 20)), axis=1).astype(np.int32))
    coding = Coding("sample", 500, 20, ())
    return item, fit_codebook(coding, [item], rng.integers(0, 99, 500))


def test_a_stored_codebook_is_the_same():
    item, book = example()
    again = Codebook.from_bytes(book.to_bytes())
    assert again.coding == book.coding
    for name in ("order", "centroids", "table_of", "freqs"):
        np.testing.assert_array_equal(getattr(again, name), getattr(book, name))
    assert encode(item, again) == encode(item, book)


def test_fitting_twice_gives_the_same_bytes():
    assert example()[1].to_bytes() == example()[1].to_bytes()


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.integers(0, 3000))
def test_a_damaged_codebook_is_refused(place, bit, cut):
    data = bytearray(example()[1].to_bytes())
    whole = bytes(data)
    data[place % len(data)] ^= 1 << bit
    for wrong in (bytes(data), whole[: max(0, len(whole) - 1 - cut)], b""):
        with pytest.raises(ValueError, match="codebook"):
            Codebook.from_bytes(wrong)


def test_a_codebook_from_the_future_is_refused():
    body = bytearray(example()[1].to_bytes()[:-16])
    body[4] = 9
    data = bytes(body) + hashlib.blake2b(bytes(body), digest_size=16).digest()
    with pytest.raises(ValueError, match="format 9; this version reads 1"):
        Codebook.from_bytes(data)


@pytest.mark.parametrize(
    "changed",
    [
        {"vocab": 2**60},
        {"vocab": 0},
        {"vocab": 501},
        {"vocab": 499},
        {"vocab": 500.0},
        {"vocab": [500]},
        {"k": 2**40},
        {"k": 20.5},
        {"method": "foo"},
        {"method": "topk"},
        {"temperatures": [1.0]},
        {"temperatures": [10**400]},
        {"step": 0.0},
        {"keep": -1.0},
        {"more": 1},
    ],
    ids=str,
)
def test_a_codebook_with_a_right_checksum_and_wrong_settings_is_refused(changed):
    """Before anything is made of its sizes."""
    data = example()[1].to_bytes()
    size = int.from_bytes(data[8:12], "little")
    header = json.loads(data[12 : 12 + size])
    header["coding"] |= changed
    text = json.dumps(header).encode()
    body = data[:8] + len(text).to_bytes(4, "little") + text + data[12 + size : -16]
    with pytest.raises(ValueError, match="codebook"):
        Codebook.from_bytes(body + hashlib.blake2b(body, digest_size=16).digest())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=SYMBOLS - 1))
def test_frequencies_make_a_code_for_every_symbol_with_a_weight(values):
    weights = np.zeros(SYMBOLS)
    weights[: len(values)] = values
    weights[ESCAPE] = 1.0
    result = frequencies(weights)
    check_frequencies(result[None])
    assert ((result > 0) == (weights > 0)).all()


def test_a_symbol_costs_its_information():
    """Of a skewed source: within 1 % of the entropy, where a prefix code needs a bit a symbol."""
    rng = np.random.default_rng(0)
    p = np.zeros(SYMBOLS)
    p[:3] = 0.94, 0.05, 0.0099
    p[ESCAPE] = 0.0001
    freqs = frequencies(p)[None]
    symbols = rng.choice(3, 50_000, p=p[:3] / p[:3].sum())
    events = np.array([event(TAIL, int(symbol), 0, 0) for symbol in symbols], np.uint64)
    words = np.empty(len(events) + 4, np.uint32)
    bases = np.zeros(len(STATE_OF), np.uint64)
    lowest = pack(events, STATE_OF, bases, code_table(freqs), words)
    share = np.bincount(symbols) / len(symbols)
    entropy = -(share * np.log2(share)).sum() * len(symbols)
    assert 32 * (len(words) - lowest) < 1.01 * entropy + 128
    assert freqs.sum() == 1 << PRECISION
