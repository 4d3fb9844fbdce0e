"""Records as bytes and back."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.logits.codebook import Codebook
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import decode, decode_many, encode, error_bound
from trainer.logits.records import MAX_VOCABULARY, Coding, Draws, Records

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Float64 probabilities over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def topk(p: np.ndarray, k: int, temperatures: tuple[float, ...] = (1.0,)) -> Records:
    """The exact records of probabilities [rows, vocab], most likely first."""
    order = np.argsort(-p, axis=1, kind="stable")
    ids, rest = order[:, :k], np.take_along_axis(p, order[:, k:], axis=1)
    with np.errstate(divide="ignore"):
        log_p = np.log(np.take_along_axis(p, ids, axis=1))
        tails = np.stack([np.log((rest ** (1 / t)).sum(axis=1)) for t in temperatures], axis=1)
    return Records(ids, log_p.astype(np.float32), tails.astype(np.float32))


def peaked(rows: int, vocab: int, seed: int = 0) -> np.ndarray:
    """Probabilities like a language model's: some rows sure, others not."""
    rng = np.random.default_rng(seed)
    steep = 1.2 + 2.5 * rng.random((rows, 1))
    logits = -steep * np.log(1 + rng.permuted(np.tile(np.arange(vocab), (rows, 1)), axis=1))
    return softmax(logits + 0.5 * rng.standard_normal((rows, vocab)))


def kept(records: Records, row: int) -> dict[int, float]:
    """Probability by id of one row, unused slots left out."""
    used = records.log_probs[row] > -np.inf
    return dict(
        zip(
            records.ids[row][used].tolist(),
            np.exp(records.log_probs[row][used].astype(np.float64)).tolist(),
            strict=True,
        )
    )


def round_trip(item: Records | Draws, coding: Coding, counts: np.ndarray | None = None) -> Records:
    """Through a codebook fitted on the item itself, stored and read."""
    book = Codebook.from_bytes(fit_codebook(coding, [item], counts).to_bytes())
    return decode(encode(item, book), book)


def check_topk(wanted: Records, got: Records, coding: Coding) -> None:
    """Ids are the wanted ones but for dropped ones; roots within a step; tails hold the rest."""
    for row in range(len(wanted.ids)):
        exact, found = kept(wanted, row), kept(got, row)
        assert set(found) <= set(exact)
        for token, p in exact.items():
            root = math.sqrt(p)
            if token in found:
                assert abs(root - math.sqrt(found[token])) <= coding.step
            else:
                assert root < coding.keep * coding.step
        unused = got.log_probs[row] == -np.inf
        assert (got.ids[row][unused] == got.ids[row, 0]).all()
        dropped = [p for token, p in exact.items() if token not in found]
        for column, temperature in enumerate(coding.temperatures):
            tail = math.exp(wanted.log_tails[row, column])
            tail += sum(p ** (1 / temperature) for p in dropped)
            read = math.exp(got.log_tails[row, column])
            if temperature == 1.0:
                assert abs(math.sqrt(tail) - math.sqrt(read)) <= 1 / 125
            else:
                assert read == pytest.approx(tail, rel=2e-3, abs=1e-27)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.86])
@pytest.mark.parametrize("temperatures", [(1.0,), (2.0,), (0.5, 1.0, 3.0)])
def test_topk_records_come_back_within_a_step(keep, temperatures):
    coding = Coding("topk", 1000, 40, temperatures, step=0.02, keep=keep)
    wanted = topk(peaked(64, 1000), 40, temperatures)
    check_topk(wanted, round_trip(wanted, coding), coding)


def test_draws_come_back_exactly():
    rng = np.random.default_rng(1)
    p = peaked(64, 500)
    draws = np.sort([rng.choice(500, 50, p=row) for row in p], axis=1).astype(np.int32)
    got = round_trip(Draws(draws), Coding("sample", 500, 50, ()))
    for row in range(64):
        ids, counts = np.unique(draws[row], return_counts=True)
        found = kept(got, row)
        assert set(found) == set(ids.tolist())
        assert [round(found[i] * 50) for i in ids.tolist()] == counts.tolist()
    assert np.isneginf(got.log_tails).all() and got.log_tails.shape == (64, 1)


def test_records_for_evaluation_keep_order_and_halves():
    wanted = topk(peaked(32, 700), 256)
    wanted = replace(
        wanted,
        entropy=np.linspace(0, 3, 32, dtype=np.float32),
        true_log_prob=np.linspace(-9, 0, 32, dtype=np.float32),
    )
    coding = Coding("exact", 700, 256)
    got = round_trip(wanted, coding)
    assert (got.ids[:, 0] == wanted.ids[:, 0]).all()
    assert (np.diff(got.log_probs, axis=1) <= 0).all()
    for row in range(32):
        exact, found = kept(wanted, row), kept(got, row)
        assert set(exact) == set(found)
        logs = np.log(list(exact.values())).astype(np.float32)
        error = np.abs(np.log([found[token] for token in exact]) - logs)
        assert (error <= error_bound(logs, coding) + 1e-6).all()
    np.testing.assert_array_equal(got.log_tails, wanted.log_tails)
    np.testing.assert_array_equal(got.entropy, wanted.entropy)
    np.testing.assert_array_equal(got.true_log_prob, wanted.true_log_prob)


def test_the_most_likely_id_comes_first_also_where_halves_tie():
    log_probs = np.log(np.array([[0.3000001, 0.3, 0.3]], np.float64)).astype(np.float32)
    wanted = Records(
        np.array([[7, 2, 5]]),
        log_probs,
        np.full((1, 1), -2.3, np.float32),
        np.ones(1, np.float32),
        np.full(1, -1.0, np.float32),
    )
    assert round_trip(wanted, Coding("exact", 9, 3)).ids[0, 0] == 7


def test_frequent_ids_first_makes_records_smaller_and_changes_nothing_else():
    rng = np.random.default_rng(2)
    often = rng.permutation(4000)
    weights = 1 / (1.0 + np.arange(4000))
    draws = often[rng.choice(4000, (256, 50), p=weights / weights.sum())]
    item = Draws(np.sort(draws, axis=1).astype(np.int32))
    counts = np.bincount(item.ids.reshape(-1), minlength=4000)
    coding = Coding("sample", 4000, 50, ())
    sizes, rows = [], []
    for numbering in (None, counts):
        book = fit_codebook(coding, [item], numbering)
        data = encode(item, book)
        sizes.append(len(data))
        rows.append([kept(decode(data, book), row) for row in range(256)])
    assert rows[0] == rows[1]
    assert sizes[1] < 0.85 * sizes[0]


def test_ids_cost_little_more_than_their_information():
    """A set of k ids out of V has log2 C(V, k) bits; all else in these rows costs nothing."""
    rng = np.random.default_rng(3)
    vocab, k, rows = 50_000, 32, 2000
    ids = np.stack([np.sort(rng.choice(vocab, k, replace=False)) for _ in range(rows)])
    equal = np.full((rows, k), math.log(1 / k), np.float32)
    records = Records(ids, equal, np.full((rows, 1), -np.inf, np.float32))
    book = fit_codebook(Coding("topk", vocab, k), [records])
    bound = (math.lgamma(vocab + 1) - math.lgamma(k + 1) - math.lgamma(vocab - k + 1)) / math.log(2)
    assert 8 * len(encode(records, book)) / rows < 1.02 * bound + 1


def test_rows_that_keep_fewer_ids_cost_fewer_bytes():
    item = topk(peaked(512, 2000), 64)
    sizes = []
    for keep in (0.0, 0.5, 1.0):
        book = fit_codebook(Coding("topk", 2000, 64, step=0.0155, keep=keep), [item])
        sizes.append(len(encode(item, book)))
    assert sizes[0] > 1.05 * sizes[1] > 1.05 * sizes[2]


def test_bytes_are_the_same_every_time_and_whatever_lies_beside():
    item = topk(peaked(32, 300), 20)
    book = fit_codebook(Coding("topk", 300, 20), [item])
    data = encode(item, book)
    assert encode(item, Codebook.from_bytes(book.to_bytes())) == data
    other = encode(topk(peaked(9, 300, seed=4), 20), book)
    both = decode_many([other, data], book)
    np.testing.assert_array_equal(both.ids[9:], decode(data, book).ids)
    np.testing.assert_array_equal(both.log_probs[9:], decode(data, book).log_probs)


def test_several_sequences_have_the_width_of_the_widest_row():
    sure = np.array([[0, 0, 0, 0]], np.int32)
    unsure = np.array([[1, 2, 3, 4]], np.int32)
    book = fit_codebook(Coding("sample", 9, 4, ()), [Draws(sure), Draws(unsure)])
    one, two = encode(Draws(sure), book), encode(Draws(unsure), book)
    assert decode(one, book).ids.shape == (1, 1)
    both = decode_many([one, two], book)
    assert both.ids.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4]]
    assert both.log_probs[0].tolist() == [0.0, -np.inf, -np.inf, -np.inf]


def test_records_unlike_those_a_codebook_was_fitted_on_come_back_all_the_same():
    coding = Coding("topk", 5000, 30, (1.0, 2.0), step=0.01, keep=0.3)
    book = fit_codebook(coding, [topk(peaked(8, 5000), 30, (1.0, 2.0))])
    flat = topk(softmax(np.random.default_rng(5).standard_normal((50, 5000))), 30, (1.0, 2.0))
    check_topk(flat, decode(encode(flat, book), book), coding)
    empty = fit_codebook(coding, [])
    check_topk(flat, decode(encode(flat, empty), empty), coding)


@quick
@given(
    vocab=st.integers(1, 300) | st.sampled_from([65_536, 151_936, MAX_VOCABULARY]),
    k=st.integers(1, 300),
    keep=st.sampled_from([0.0, 0.5, 1.5]),
    step=st.floats(0.002, 0.1),
    kind=st.sampled_from(["peaked", "one", "equal", "holes"]),
    seed=st.integers(0, 99),
    mapped=st.booleans(),
)
def test_any_shape_of_row_comes_back(vocab, k, keep, step, kind, seed, mapped):
    rng = np.random.default_rng(seed)
    k = min(k, vocab)
    small = min(vocab, 400)  # probabilities of the rest are 0
    logits = rng.standard_normal((3, small)) * 3
    if kind == "one":
        logits[:, 1:] = -np.inf
    elif kind == "equal":
        logits[:] = 0.0
    elif kind == "holes":
        logits[:, small // 2 + 1 :] = -np.inf
    places = np.sort(rng.choice(vocab, small, replace=False))
    wanted = topk(softmax(logits), min(k, small))
    wanted = replace(wanted, ids=places[wanted.ids])
    coding = Coding("topk", vocab, k, step=step, keep=keep)
    counts = rng.integers(0, 9, vocab) if mapped else None
    book = fit_codebook(coding, [wanted], counts)
    got = decode(encode(wanted, book), book)
    # An id without probability may be left out: it says nothing.
    for row in range(3):
        exact = {token: p for token, p in kept(wanted, row).items() if p > 0}
        found = kept(got, row)
        assert set(found) <= set(exact)
        for token, p in exact.items():
            error = abs(math.sqrt(p) - math.sqrt(found.get(token, 0.0)))
            assert error <= max(step, keep * step)
        assert found[max(exact, key=exact.__getitem__)] > 0


@quick
@given(
    vocab=st.integers(1, 50) | st.sampled_from([151_936, MAX_VOCABULARY]),
    draws=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_any_draws_come_back(vocab, draws, seed):
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(0, vocab, (4, draws)), axis=1).astype(np.int32)
    ids[0] = vocab - 1
    got = round_trip(Draws(ids), Coding("sample", vocab, draws, ()))
    for row in range(4):
        want = dict(zip(*np.unique(ids[row], return_counts=True), strict=True))
        found = {token: round(p * draws) for token, p in kept(got, row).items()}
        assert found == {int(token): int(count) for token, count in want.items()}


@settings(max_examples=200, deadline=None)
@given(
    method=st.sampled_from(["topk", "sample", "exact"]),
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 7)), max_size=4),
    noise=st.binary(max_size=60),
)
def test_wrong_bytes_are_an_error_or_a_record_never_a_crash(method, cut, flips, noise):
    item, book = EXAMPLES[method]
    data = bytearray(encode(item, book))
    for place, bit in flips:
        data[place % len(data)] ^= 1 << bit
    for wrong in (bytes(data), bytes(data)[: len(data) - cut], noise, bytes(data[:8]) + noise):
        try:
            got = decode(wrong, book)
        except ValueError:
            continue
        assert got.ids.shape == got.log_probs.shape
        assert ((got.ids >= 0) & (got.ids < 90)).all()


def test_most_changed_bits_are_noticed_even_without_a_checksum():
    """A stream ends with its states as they began, at its last word."""
    item, book = EXAMPLES["sample"]
    data = encode(item, book)
    places = [(place, bit) for place in range(8, len(data)) for bit in range(8)]
    noticed = 0
    for place, bit in places:
        wrong = bytearray(data)
        wrong[place] ^= 1 << bit
        try:
            decode(bytes(wrong), book)
        except ValueError:
            noticed += 1
    assert noticed > 0.8 * len(places)


def examples() -> dict[str, tuple[Records | Draws, Codebook]]:
    """A small item of each method, and its codebook."""
    p = peaked(12, 90)
    for_losses = topk(p, 6, (1.0, 2.0))
    exact = replace(
        topk(p, 6), entropy=np.ones(12, np.float32), true_log_prob=np.zeros(12, np.float32)
    )
    drawn = Draws(np.sort(np.random.default_rng(6).integers(0, 90, (12, 6))).astype(np.int32))
    result: dict[str, tuple[Records | Draws, Codebook]] = {}
    for coding, item in (
        (Coding("topk", 90, 6, (1.0, 2.0)), for_losses),
        (Coding("sample", 90, 6, ()), drawn),
        (Coding("exact", 90, 6), exact),
    ):
        result[coding.method] = (item, fit_codebook(coding, [item]))
    return result


EXAMPLES = examples()


@pytest.mark.parametrize("rows", [2**31, 2**32 - 1])
@pytest.mark.parametrize("method", EXAMPLES)
def test_absurd_sizes_are_refused_before_any_memory_is_taken(method, rows):
    item, book = EXAMPLES[method]
    data = bytearray(encode(item, book))
    data[4:8] = rows.to_bytes(4, "little")
    with pytest.raises(ValueError, match="ids in"):
        decode(bytes(data), book)


@pytest.mark.parametrize("method", ["topk", "sample", "exact"])
def test_thousands_of_rows_that_say_next_to_nothing_come_back(method):
    """Of a sure teacher a row costs less than a bit."""
    rows, k = 4096, 1 if method == "exact" else 3
    coding = Coding(method, 50, k, () if method == "sample" else (1.0,), keep=0.5)
    tail, zeros = np.full((rows, 1), -np.inf, np.float32), np.zeros(rows, np.float32)
    item: Records | Draws
    if method == "sample":
        item = Draws(np.full((rows, k), 7, np.int32))
    elif method == "topk":
        sure = np.tile(np.array([0.0, -40.0, -40.0], np.float32), (rows, 1))
        item = Records(np.tile(np.array([7, 3, 9]), (rows, 1)), sure, tail)
    else:
        item = Records(np.full((rows, 1), 7), zeros[:, None], tail, zeros, zeros)
    got = round_trip(item, coding)
    assert got.ids.shape == (rows, 1) and (got.ids == 7).all()
    if method == "sample":
        assert len(encode(item, fit_codebook(coding, [item]))) < rows / 8


def test_a_sequence_of_another_length_is_refused():
    item, book = EXAMPLES["sample"]
    data = encode(item, book)
    assert decode_many([data, data], book, 12).ids.shape[0] == 24
    with pytest.raises(ValueError, match="12 positions; its sequence has 13"):
        decode_many([data], book, 13)


def test_a_record_of_another_method_or_version_is_refused():
    item, book = EXAMPLES["sample"]
    data = encode(item, book)
    with pytest.raises(ValueError, match="version 2 and method 1; expected 2 and 0"):
        decode(data, EXAMPLES["topk"][1])
    with pytest.raises(ValueError, match="version 9"):
        decode(b"\x09" + data[1:], book)


def test_nan_is_refused():
    item, book = EXAMPLES["topk"]
    for name in ("log_probs", "log_tails"):
        values = getattr(item, name).copy()
        values[3, 1] = np.nan
        with pytest.raises(ValueError, match="NaN|none"):
            encode(replace(item, **{name: values}), book)
    item, book = EXAMPLES["exact"]
    for name in ("log_probs", "entropy", "true_log_prob", "log_tails"):
        values = getattr(item, name).copy()
        values.reshape(-1)[3] = np.nan
        with pytest.raises(ValueError, match="NaN"):
            encode(replace(item, **{name: values}), book)


@pytest.mark.parametrize("wrong", [-1, 90])
@pytest.mark.parametrize("method", EXAMPLES)
def test_ids_outside_of_the_vocabulary_are_refused(method, wrong):
    item, book = EXAMPLES[method]
    ids = item.ids.copy()
    ids[4, 2] = wrong
    with pytest.raises(ValueError, match="position 4: .* outside of the vocabulary"):
        encode(replace(item, ids=ids), book)


@pytest.mark.parametrize("method", ["topk", "exact"])
def test_an_id_twice_in_a_row_is_refused(method):
    item, book = EXAMPLES[method]
    ids = item.ids.copy()
    ids[5, 1] = ids[5, 0]
    with pytest.raises(ValueError, match="position 5: .* repeated"):
        encode(replace(item, ids=ids), book)


def test_a_level_of_zero_is_decoded_as_a_small_probability_never_none():
    p = np.full((40, 50), 1e-6)
    p[:, 0] = 1 - 49e-6
    coding = Coding("topk", 50, 10)
    got = round_trip(topk(p, 10), coding)
    small = np.exp(got.log_probs[:, 1:].astype(np.float64))
    assert (small > 0).all() and (small < coding.step**2).all()
