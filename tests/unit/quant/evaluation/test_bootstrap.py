from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from quant.evaluation import bootstrap
from quant.evaluation.bootstrap import (
    Interval,
    difference_interval,
    mcnemar,
    mean_interval,
    ratio_of_perplexities,
    relative_reduction,
    tied,
)

REPEATS = 400


def divergences(rng: np.random.Generator, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts per sequence of skewed values whose mean over tokens is 1.

    Each sequence has an effect of its own (lognormal, mean 1), each token a lognormal value, and
    lengths go from 40 to 399 tokens.
    """
    counts = rng.integers(40, 400, sequences)
    effects = np.exp(rng.normal(-0.18, 0.6, sequences))
    of = np.repeat(np.arange(sequences), counts)
    tokens = rng.lognormal(-0.5, 1.0, counts.sum()) * effects[of]
    return np.bincount(of, weights=tokens, minlength=sequences), counts


def per_token(sums: np.ndarray, counts: np.ndarray) -> Interval:
    """What takes each token for an independent draw: the same mean, far more draws."""
    mean, tokens = sums.sum() / counts.sum(), counts.sum()
    spread = math.sqrt(math.exp(1.36) - 1)  # of one token, in closed form
    half = 1.96 * spread / math.sqrt(tokens)
    return Interval(mean, mean - half, mean + half)


def coverage(make, truth: float, draw) -> float:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(REPEATS):
        found = make(*draw(rng))
        hits += found.low <= truth <= found.high
    return hits / REPEATS


@pytest.mark.parametrize(("sequences", "least"), [(16, 0.92), (64, 0.925), (256, 0.925)])
def test_covers_the_truth_where_tokens_of_a_sequence_are_alike(sequences, least):
    """95 % +- 2.3 standard errors of 400 repeats (1.09 % each); 3 % less at 16 is allowed."""

    def draw(rng):
        return divergences(rng, sequences)

    assert least <= coverage(mean_interval, 1.0, draw) <= 0.98
    assert coverage(per_token, 1.0, draw) < 0.6  # the simulation tells them apart


def test_paired_differences_cover_and_are_narrower_than_unpaired_ones():
    def pairs(rng):
        base, counts = divergences(rng, 32)
        return base + rng.normal(0.1, 0.05, 32) * counts, base, counts

    assert 0.925 <= coverage(difference_interval, 0.1, pairs) <= 0.98
    a, b, counts = pairs(np.random.default_rng(0))
    paired, alone = difference_interval(a, b, counts), mean_interval(a, counts)
    assert paired.high - paired.low < (alone.high - alone.low) / 5
    assert paired.value == pytest.approx((a.sum() - b.sum()) / counts.sum(), rel=1e-12)


def test_relative_reductions_cover():
    def pairs(rng):
        base, counts = divergences(rng, 32)
        return base, base * rng.gamma(9, 0.7 / 9, 32), counts

    # the ratio of both means: factors are independent of what they lower, with mean 0.7
    assert 0.92 <= coverage(relative_reduction, 0.3, pairs) <= 0.98


def test_many_normal_sequences_give_the_textbook_interval():
    rng = np.random.default_rng(2)
    values = rng.normal(3.0, 1.0, 2000)
    found = mean_interval(values * 50, np.full(2000, 50))
    half = 1.96 * values.std(ddof=1) / math.sqrt(2000)
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_the_mean_is_over_tokens_and_levels_nest():
    sums, counts = divergences(np.random.default_rng(3), 20)
    found = {level: mean_interval(sums, counts, level) for level in (0.5, 0.8, 0.95)}
    assert found[0.5].value == pytest.approx(sums.sum() / counts.sum(), rel=1e-12)
    assert abs(found[0.5].value - (sums / counts).mean()) > 1e-3
    ends = [found[level].low for level in (0.95, 0.8, 0.5)]
    ends += [found[level].high for level in (0.5, 0.8, 0.95)]
    assert ends == sorted(ends) and len(set(ends)) == 6


def test_the_same_sums_give_the_same_interval_in_any_scale():
    sums, counts = divergences(np.random.default_rng(4), 40)
    first = mean_interval(sums, counts)
    np.random.default_rng(0).random(5)
    np.random.seed(1)
    assert mean_interval(sums.tolist(), counts.tolist()) == first
    small = mean_interval(sums * 2.0**-60, counts)
    assert small.low == first.low * 2.0**-60 and small.high == first.high * 2.0**-60
    assert json.loads(json.dumps(asdict(first))) == asdict(first)
    assert bootstrap.description()["seed"] == bootstrap.SEED


def test_blocks_of_resamples_change_nothing(monkeypatch):
    sums, counts = divergences(np.random.default_rng(5), 30)
    whole = mean_interval(sums, counts)
    monkeypatch.setattr(bootstrap, "BLOCK", 30 * 7)
    parts = mean_interval(sums, counts)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_resamples_are_multinomial():
    weights = np.concatenate(list(bootstrap._weights(25)))
    assert weights.shape == (bootstrap.RESAMPLES, 25) and (weights.sum(1) == 25).all()
    assert weights.mean() == 1 and abs(weights.var() - 24 / 25) < 0.03
    assert np.abs(weights.mean(0) - 1).max() < 4.5 / math.sqrt(bootstrap.RESAMPLES)


def test_one_sequence_has_no_interval():
    assert mean_interval([6.0], [4]) == Interval(1.5, None, None)
    assert mean_interval([6.0, 0.0], [4, 0]) == Interval(1.5, None, None)
    assert tied([1.0], [1.0], [2]) is None
    assert ratio_of_perplexities([2.0], [2.0], [4]) == Interval(1.0, None, None)
    assert Interval(1.5, None, None).within(0, 1) == Interval(1.5, None, None)


def test_equal_values_have_an_interval_without_width():
    counts = np.array([3, 17, 5, 5])
    assert mean_interval(np.zeros(4), counts) == Interval(0.0, 0.0, 0.0)
    assert mean_interval(counts, counts) == Interval(1.0, 1.0, 1.0)
    tenth = mean_interval(0.1 * counts, counts)
    assert tenth.low == tenth.value == tenth.high == pytest.approx(0.1, rel=1e-15)
    assert difference_interval(counts, counts, counts) == Interval(0.0, 0.0, 0.0)
    assert tied(counts, counts, counts) is True
    assert relative_reduction(4.0 * counts, 3.0 * counts, counts) == Interval(0.25, 0.25, 0.25)


def test_sequences_without_tokens_say_nothing():
    sums, counts = divergences(np.random.default_rng(6), 12)
    found = mean_interval(np.insert(sums, 5, 0.0), np.insert(counts, 5, 0))
    assert found == mean_interval(sums, counts)


@pytest.mark.parametrize("events", [1, 2, 4])
def test_a_few_sequences_that_differ_leave_a_finite_interval(events):
    """Most resamples of one event among 200 sequences have no spread, or miss it altogether."""
    sums = np.zeros(200)
    sums[:events] = 1.0
    found = mean_interval(sums, np.full(200, 10))
    assert math.isfinite(found.low) and math.isfinite(found.high)
    # at most what a Poisson count of so many events allows, and not far below it
    upper = {1: 5.57, 2: 7.22, 4: 10.24}[events] / 2000
    assert 0.5 * upper < found.high < 1.05 * upper
    assert found.low < found.value


def test_two_sequences_have_students_interval():
    found = mean_interval([10.0, 30.0], [10, 10])
    half = 12.706 * 1.0  # Student's t with one degree of freedom times the standard error
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-4)


def test_ties():
    sums, counts = divergences(np.random.default_rng(8), 64)
    noise = np.random.default_rng(9).normal(0, 0.02, 64) * counts
    noise -= counts * noise.sum() / counts.sum()
    assert tied(sums, sums + noise, counts) is True
    assert tied(sums, sums + noise + 0.02 * counts, counts) is False
    assert tied(sums + noise + 0.02 * counts, sums, counts) is False


def test_ratio_of_perplexities_is_exp_of_the_paired_difference():
    nll, counts = divergences(np.random.default_rng(10), 48)
    worse = nll + 0.05 * counts + np.random.default_rng(11).normal(0, 0.01, 48) * counts
    found = ratio_of_perplexities(worse, nll, counts)
    tokens = counts.sum()
    expected = math.exp(worse.sum() / tokens) / math.exp(nll.sum() / tokens)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert 1.04 < found.low < found.value < found.high < 1.065
    back = ratio_of_perplexities(nll, worse, counts)
    assert (back.low, back.high) == pytest.approx((1 / found.high, 1 / found.low), rel=2e-3)
    assert ratio_of_perplexities(nll, nll, counts) == Interval(1.0, 1.0, 1.0)


def test_relative_reduction_is_one_minus_the_ratio_of_means():
    base, counts = divergences(np.random.default_rng(12), 30)
    lower = 0.6 * base + np.random.default_rng(13).normal(0, 0.02, 30) * counts
    found = relative_reduction(base, lower, counts)
    assert found.value == pytest.approx(1 - lower.sum() / base.sum(), rel=1e-12)
    assert found.low < found.value < found.high and found.low > 0.35 and found.high < 0.45
    worse = relative_reduction(lower, base, counts)
    assert worse.high < 0
    some = base.copy()
    some[3] = 0.0  # a sequence that has nothing to lower still counts for what it became
    assert (
        relative_reduction(some, lower, counts).value
        < relative_reduction(base, lower, counts).value
    )


def test_cut_to_what_can_be():
    assert Interval(0.1, -0.2, 0.4).within(0, 1) == Interval(0.1, 0, 0.4)
    assert Interval(0.9, 0.7, 1.2).within(0, 1) == Interval(0.9, 0.7, 1)
    # a divergence may round to just below 0: its own interval still holds it
    assert Interval(-1e-9, -2e-9, 1e-9).within(0, math.inf) == Interval(-1e-9, -1e-9, 1e-9)


@pytest.mark.parametrize(("a", "b"), [(0, 1), (3, 9), (12, 12), (0, 0), (7, 30)])
def test_mcnemar_is_the_exact_two_sided_binomial(a, b):
    n = a + b
    tail = sum(math.comb(n, k) for k in range(min(a, b) + 1)) / 2**n
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_refusals():
    with pytest.raises(ValueError, match=r"sums are \[2\] and counts \[3\]"):
        mean_interval([1.0, 2.0], [1, 2, 3])
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, math.nan], [1, 2])
    with pytest.raises(ValueError, match="no sequence"):
        mean_interval([0.0], [0])
    with pytest.raises(ValueError, match="the mean that is to be reduced is 0; must be above 0"):
        relative_reduction([0.0, 0.0], [1.0, 1.0], [1, 1])
    with pytest.raises(ValueError, match="may not be negative"):
        mcnemar(-1, 2)
