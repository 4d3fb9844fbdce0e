"""Records as bytes and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.logits.codec import MAX_VOCABULARY, VERSION, Records, decode, encode, error_bound


def make(positions: int, k: int, vocab: int, temperatures: int = 2, *, is_eval: bool = False):
    draw = np.random.default_rng(positions * k + vocab)
    logits = draw.normal(size=(positions, max(k, 2))) * 4
    log_probs = -np.sort(-(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))))[:, :k]
    return Records(
        draw.integers(0, vocab, size=(positions, k), dtype=np.int32),
        log_probs.astype(np.float32),
        draw.normal(size=(positions, temperatures)).astype(np.float32),
        draw.random(positions, dtype=np.float32) if is_eval else None,
        -draw.random(positions, dtype=np.float32) if is_eval else None,
    )


@given(
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from([2, 1 << 16, (1 << 16) + 1, 1 << 17, 151_936, MAX_VOCABULARY]),
    st.integers(1, 3),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_goes_in_comes_out(positions, k, vocab, temperatures, is_eval) -> None:
    records = make(positions, k, vocab, temperatures, is_eval=is_eval)
    found = decode(encode(records))
    np.testing.assert_array_equal(found.ids, records.ids)
    assert found.ids.dtype == np.int32 and found.log_probs.dtype == np.float32
    difference = np.abs(found.log_probs - records.log_probs)
    assert (difference <= error_bound(records.log_probs)).all()
    np.testing.assert_array_equal(found.log_tails, records.log_tails)
    if is_eval:
        np.testing.assert_array_equal(found.entropy, records.entropy)
        np.testing.assert_array_equal(found.true_log_prob, records.true_log_prob)
    else:
        assert found.entropy is None and found.true_log_prob is None


@pytest.mark.parametrize("highest", [1, 0xFFFF, 0x10000, (1 << 17) - 1, 1 << 17, 151_935, 1 << 19])
def test_ids_are_not_cut_at_16_or_17_bits(highest) -> None:
    """Ids fixed at 17 bits: a vocabulary of 151,936 wraps around without a word."""
    records = make(3, 4, 2)
    records.ids[1, 2] = highest
    np.testing.assert_array_equal(decode(encode(records)).ids, records.ids)


@pytest.mark.parametrize("bad", [-1, MAX_VOCABULARY, 2**31 - 1])
def test_ids_that_do_not_fit_are_refused(bad) -> None:
    records = make(3, 4, 2)
    records.ids[0, 0] = bad
    with pytest.raises(ValueError, match="beyond the largest vocabulary"):
        encode(records)


def test_extreme_values_survive() -> None:
    """A tail of nothing, a certain token, and log-probabilities near float16's ends."""
    log_probs = np.array([[0.0, -1e-6, -65000.0, -1e-3]], dtype=np.float32)
    records = Records(
        np.arange(4, dtype=np.int32)[None], log_probs, np.array([[-np.inf]], dtype=np.float32)
    )
    found = decode(encode(records))
    assert np.isneginf(found.log_tails).all()
    assert (np.abs(found.log_probs - log_probs) <= error_bound(log_probs)).all()


def test_a_log_probability_of_minus_infinity_stays_one() -> None:
    records = Records(
        np.zeros((1, 1), np.int32),
        np.full((1, 1), -np.inf, np.float32),
        np.zeros((1, 1), np.float32),
    )
    assert np.isneginf(decode(encode(records)).log_probs).all()


def test_the_size_is_what_the_layout_says() -> None:
    header = len(encode(make(1, 1, 2))) - (2 + 2 + 8)
    assert len(encode(make(10, 5, 1 << 16))) == header + 10 * (5 * (2 + 2) + 2 * 4)
    wide = make(10, 5, 2)
    wide.ids[0, 0] = 1 << 16
    assert len(encode(wide)) == header + 10 * (5 * (3 + 2) + 2 * 4)
    assert len(encode(make(10, 5, 2, is_eval=True))) == header + 10 * (5 * 4 + 2 * 4 + 8)


def test_the_bytes_are_the_same_in_every_process() -> None:
    """A golden record: bytes that older caches hold must keep their meaning."""
    records = Records(
        np.array([[3, 70000]], np.int32),
        np.array([[-0.5, -2.0]], np.float32),
        np.array([[-1.25]], np.float32),
    )
    data = encode(records)
    assert data.hex() == "53484c4301020200010000000100000003007011000100b800c00000a0bf"
    assert data[4] == VERSION


def test_other_bytes_are_refused() -> None:
    data = encode(make(4, 3, 9))
    with pytest.raises(ValueError, match="cut short"):
        decode(data[:7])
    with pytest.raises(ValueError, match=f"no record of the logit cache in format {VERSION}"):
        decode(b"XXXX" + data[4:])
    with pytest.raises(ValueError, match="capture it again"):
        decode(data[:4] + bytes([VERSION + 1]) + data[5:])
    with pytest.raises(ValueError):
        decode(data[:-1])
