"""Intervals of means over tokens, where whole sequences are the independent units.

Tokens of one sequence are alike: an interval that takes each token for an independent draw is far
too narrow. So sequences are resampled, and every statistic is a ratio of two sums over sequences.
A resample is studentized by its own standard error (the bootstrap-t: Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, section 12.5), as the plain percentile bootstrap covers too
little where sequences are few or values are skewed, which divergences always are. The standard
error of a ratio is the linearized one (Cochran, Sampling Techniques, 1977, section 6.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
RESAMPLES = 2000
SEED = 20_601  # fixed: the same sums give the same interval, wherever and whenever
FEW = 8  # below so many sequences a resample's own standard error says nothing
BLOCK = 1 << 21  # weights in memory at a time

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A statistic and the ends of its interval; both None where one sequence leaves it open."""

    value: float
    low: float | None
    high: float | None

    @property
    def holds_zero(self) -> bool | None:
        """Whether 0 lies in the interval, ends included; None where there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low <= 0 <= self.high

    def within(self, low: float, high: float) -> Interval:
        """The interval cut to values that the statistic can take; the value stays inside it."""
        if self.low is None or self.high is None:
            return self
        return Interval(
            self.value,
            min(max(self.low, low), self.value),
            max(min(self.high, high), self.value),
        )

    def map(self, function: Callable[[float], float], falling: bool = False) -> Interval:
        """The interval of a monotone function of the statistic (falling: ends change places)."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Interval(function(self.value), *((high, low) if falling else (low, high)))


def description(level: float = LEVEL) -> dict[str, Any]:
    """How intervals are made, for a result that holds some."""
    return {
        "level": level,
        "unit": "sequence",
        "method": f"studentized bootstrap; Student's t below {FEW} sequences",
        "resamples": RESAMPLES,
        "seed": SEED,
    }


def mean_interval(sums: ArrayLike, counts: ArrayLike, level: float = LEVEL) -> Interval:
    """The mean over tokens, sum(sums) / sum(counts), with its interval at `level`.

    sums: a value's sum over the tokens of each sequence, float `[sequences]`; counts: their number
    of tokens. Sequences without tokens say nothing and are left out. One sequence has no interval:
    low and high are None. Where all sequences have the same mean, both are that mean.
    Raises ValueError for shapes that differ, values that are not finite, or no token at all.
    """
    values, tokens = _checked(sums, counts)
    return _ratio(values, tokens, level)


def difference_interval(
    sums_a: ArrayLike, sums_b: ArrayLike, counts: ArrayLike, level: float = LEVEL
) -> Interval:
    """The mean over tokens of a - b, paired: both were measured on the same sequences.

    Arguments and errors are those of `mean_interval`.
    """
    a, tokens = _checked(sums_a, counts)
    b, _ = _checked(sums_b, counts)
    return _ratio(a - b, tokens, level)


def tied(
    sums_a: ArrayLike, sums_b: ArrayLike, counts: ArrayLike, level: float = LEVEL
) -> bool | None:
    """Whether the paired interval of the difference contains 0; None where there is none."""
    return difference_interval(sums_a, sums_b, counts, level).holds_zero


def ratio_of_perplexities(
    nll_a: ArrayLike, nll_b: ArrayLike, counts: ArrayLike, level: float = LEVEL
) -> Interval:
    """Perplexity of a over perplexity of b, from the sums of their nll (nats) per sequence.

    It is exp of the paired difference of nats per token, and its interval likewise. Raises
    ValueError as `mean_interval` does, OverflowError from 709 nats per token on.
    """
    return difference_interval(nll_a, nll_b, counts, level).map(math.exp)


def relative_reduction(
    sums_a: ArrayLike, sums_b: ArrayLike, counts: ArrayLike, level: float = LEVEL
) -> Interval:
    """By which part b's mean is below a's: 1 - mean_b / mean_a, paired (0.3: 30 % lower).

    The means are over the same tokens, so their ratio is that of the sums. Raises ValueError as
    `mean_interval` does, and when a's mean is not above 0.
    """
    a, tokens = _checked(sums_a, counts)
    b, _ = _checked(sums_b, counts)
    if a.sum() <= 0:
        raise ValueError(
            f"the mean that is to be reduced is {a.sum() / tokens.sum():g}; must be above 0"
        )
    return _ratio(b, a, level).map(lambda part: 1 - part, falling=True)


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """p-value that flips between right and wrong answers go both ways equally often.

    The exact, two-sided test on the answers that differ (McNemar, Psychometrika 12, 1947); 1 when
    none does. Raises ValueError for negative numbers.
    """
    from scipy.stats import binomtest  # slow to import

    flips = right_to_wrong + wrong_to_right
    if min(right_to_wrong, wrong_to_right) < 0:
        raise ValueError(f"{right_to_wrong} and {wrong_to_right} flips; may not be negative")
    return float(binomtest(right_to_wrong, flips, 0.5).pvalue) if flips else 1.0


def _checked(sums: ArrayLike, counts: ArrayLike) -> tuple[Floats, Floats]:
    """Sums and counts as float64, of the sequences that have tokens."""
    values, tokens = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if values.ndim != 1 or values.shape != tokens.shape:
        raise ValueError(
            f"sums are {list(values.shape)} and counts {list(tokens.shape)}; must be one number "
            "each per sequence"
        )
    if not (np.isfinite(values).all() and np.isfinite(tokens).all()) or (tokens < 0).any():
        raise ValueError("sums and counts must be finite, counts not negative")
    some = tokens > 0
    if not some.any():
        raise ValueError("no sequence has a token that counts")
    return values[some], tokens[some]


def _ratio(numerators: Floats, denominators: Floats, level: float) -> Interval:
    """sum(numerators) / sum(denominators) over sequences, with its interval."""
    number, whole = len(numerators), float(denominators.sum())
    value = float(numerators.sum()) / whole
    if number == 1:
        return Interval(value, None, None)
    left = numerators - value * denominators
    # Differences of the last few bits are rounding of equal means.
    scale = np.maximum(np.abs(numerators), np.abs(value * denominators)).max()
    if np.abs(left).max() <= 8 * np.finfo(np.float64).eps * scale:
        return Interval(value, value, value)
    error = math.sqrt(number / (number - 1) * float(left @ left)) / whole
    below, above = _quantiles(left, denominators, level)
    return Interval(value, value - above * error, value - below * error)


def _quantiles(left: Floats, denominators: Floats, level: float) -> tuple[float, float]:
    """Both quantiles of (estimate - truth) / standard error that the interval leaves out.

    left: what of each numerator the ratio does not explain; it sums to 0.
    """
    number, ends = len(left), ((1 - level) / 2, (1 + level) / 2)
    if number >= FEW:
        t = np.concatenate(list(_studentized(left, denominators)))
        # Not interpolated: between an infinite and a finite value there is nothing.
        below, above = (float(q) for q in np.quantile(t, ends, method="inverted_cdf"))
        if math.isfinite(below) and math.isfinite(above):
            return below, above
        # Nearly all sequences are alike, and many a resample misses the few that are not.
    from scipy.stats import t as student

    end = float(student.ppf(ends[1], number - 1))
    return -end, end


def _studentized(left: Floats, denominators: Floats) -> Iterator[Floats]:
    """Blocks of (resampled ratio - ratio) / standard error of the resampled ratio."""
    number = len(left)
    # Sums of the resampled ratio's own residuals, left - shift * denominators, and of squares.
    terms = np.stack([left, denominators, left**2, left * denominators, denominators**2], axis=1)
    for weights in _weights(number):
        rest, whole, rest2, mixed, whole2 = (weights @ terms).T
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = rest / whole
            squares = rest2 - 2 * shift * mixed + shift**2 * whole2
            # What cancels to nothing in float64 is a resample of sequences that are all alike.
            squares[squares <= 1e-12 * rest2] = 0.0
            t = rest / np.sqrt(number / (number - 1) * squares)
        yield np.where(np.isnan(t), 0.0, t)


def _weights(number: int) -> Iterator[Floats]:
    """How often each sequence is drawn in each resample, float64 `[resamples, number]`, in blocks.

    Rows sum to `number`. They depend on the number of sequences alone, so that statistics of the
    same sequences are resampled alike.
    """
    generator = np.random.default_rng([SEED, number])
    rows = max(1, min(RESAMPLES, BLOCK // number))
    for first in range(0, RESAMPLES, rows):
        here = min(rows, RESAMPLES - first)
        drawn = generator.integers(number, size=(here, number))
        drawn += np.arange(here)[:, None] * number
        counts = np.bincount(drawn.ravel(), minlength=here * number)
        yield counts.reshape(here, number).astype(np.float64)
