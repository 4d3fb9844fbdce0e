"""The knapsack against every choice there is, and against the bound of its relaxation."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.allocation import Option, Options
from quant.allocation import knapsack as module
from quant.allocation.knapsack import knapsack
from quant.quant_spec import QuantSpec

SPECS = [QuantSpec(bits, 8 * size) for bits in (8, 6, 5, 4, 3, 2, 1) for size in range(1, 9)]


def made(rows: list[list[tuple[int, float]]], fixed: int = 0) -> tuple[Options, dict]:
    """Options of (bytes, loss) per layer, and their losses."""
    layers, losses = {}, {}
    for number, row in enumerate(rows):
        options = [Option(SPECS[at], size) for at, (size, _) in enumerate(row)]
        layers[f"l{number}"] = tuple(sorted(options, key=lambda option: option.bytes))
        for option, (_, loss) in zip(options, row, strict=True):
            losses[f"l{number}", option.key] = loss
    return Options(layers, fixed), losses


def least(options: Options, losses: dict, budget: int) -> tuple[float, int] | None:
    """Least sum of losses, and the fewest bytes for it, by trying every choice."""
    every = itertools.product(*options.layers.values())
    sums = [
        (sum(losses[n, o.key] for n, o in zip(options.layers, choice, strict=True)), size)
        for choice in every
        if (size := options.fixed_bytes + sum(o.bytes for o in choice)) <= budget
    ]
    return min(sums) if sums else None


ROW = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=4), st.integers(0, 9), st.integers(-5, 170))
def test_it_is_the_best_of_all_choices(rows, fixed, budget):
    options, losses = made([[(size, float(loss)) for size, loss in row] for row in rows], fixed)
    expected = least(options, losses, budget)
    if expected is None:
        with pytest.raises(ValueError, match="too small: .* gives"):
            knapsack(options, losses, budget)
        return
    chosen = knapsack(options, losses, budget)
    total = sum(losses[name, option.key] for name, option in chosen.items())
    assert (total, options.total(chosen)) == expected
    assert all(chosen[name] in each for name, each in options.layers.items())


@settings(max_examples=100, deadline=None)
@given(st.lists(ROW, min_size=2, max_size=4), st.integers(0, 40))
def test_rounded_bytes_never_exceed_the_budget(rows, free):
    """12 units at most: the table is coarse, and rounded bytes may add up to more."""
    options, losses = made([[(97 * s, float(loss)) for s, loss in row] for row in rows], 7)
    budget = options.smallest + 97 * free + 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "UNITS", (1, 12))
        chosen = knapsack(options, losses, budget)
    expected = least(options, losses, budget)
    assert options.total(chosen) <= budget and expected is not None
    assert sum(losses[name, option.key] for name, option in chosen.items()) >= expected[0]


def test_rounding_that_adds_up_is_taken_back(monkeypatch):
    """Every step of 149 bytes counts as one unit of 100; 12 such steps fit 12 units, not 1,200."""
    monkeypatch.setattr(module, "UNITS", (1, 12))
    options, losses = made([[(0, 1.0), (149 + (row == 0), 0.0)] for row in range(12)])
    chosen = knapsack(options, losses, 1200)
    assert options.total(chosen) <= 1200
    assert sum(losses[name, option.key] for name, option in chosen.items()) <= 5  # 4 at best


def large(seed: int, layers: int = 300, widths: int = 9) -> tuple[Options, dict]:
    """Layers of odd sizes whose losses fall with the bits, unevenly."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(layers):
        weights = int(rng.integers(100_000, 4_000_000)) | 1
        bits = np.sort(rng.uniform(1.1, 8.5, widths))
        loss = rng.lognormal(-6, 2) * 4.0**-bits * rng.lognormal(0, 0.3, widths)
        rows.append([(int(weights * b / 8), float(x)) for b, x in zip(bits, loss, strict=True)])
    return made(rows, 12_345)


def relaxed(options: Options, losses: dict, budget: int) -> float:
    """No choice within the budget has less loss: the greatest value of the Lagrangian dual, which
    is that of the relaxation to fractions of options."""
    sizes = np.array([[o.bytes for o in each] for each in options.layers.values()], float)
    costs = np.array([[losses[n, o.key] for o in each] for n, each in options.layers.items()])
    free = budget - options.fixed_bytes

    def dual(price: float) -> float:
        return float((costs + price * sizes).min(1).sum() - price * free)

    return max(dual(10.0**power) for power in np.linspace(-18, -3, 6001))


@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
def test_300_layers_of_9_options_are_near_the_bound_in_no_time(share):
    options, losses = large(7)
    largest = options.fixed_bytes + sum(each[-1].bytes for each in options.layers.values())
    budget = options.smallest + int(share * (largest - options.smallest))
    start = time.process_time()
    chosen = knapsack(options, losses, budget)
    seconds = time.process_time() - start
    total = sum(losses[name, option.key] for name, option in chosen.items())
    start = time.process_time()
    bound = relaxed(options, losses, budget)
    measure = time.process_time() - start  # 6001 sums over the same table
    assert bound * (1 - 1e-9) <= total <= 1.002 * bound, total / bound
    assert options.total(chosen) <= budget
    assert seconds < 10 * measure, seconds / measure  # seen: 1.6


def test_more_bytes_never_lose():
    options, losses = made([[(3, 5.0), (7, 1.0)], [(2, 4.0), (9, 3.0), (12, 0.5)], [(1, 1.0)]])
    sums = [
        sum(losses[n, o.key] for n, o in knapsack(options, losses, budget).items())
        for budget in range(6, 30)
    ]
    assert sums == sorted(sums, reverse=True) and sums[-1] == 2.5


def test_sixteen_bits_cost_nothing_and_what_was_not_measured_is_not_chosen():
    spec = QuantSpec(2, 64)
    options = Options({"a": (Option(spec, 10), Option(None, 100))}, 5)
    assert knapsack(options, {("a", "2b-g64"): 1.0}, 104)["a"].spec == spec
    assert knapsack(options, {("a", "2b-g64"): 1.0}, 105)["a"].spec is None
    assert knapsack(options, {}, 105)["a"].spec is None
    with pytest.raises(ValueError, match="smallest choice .* gives 105 bytes, 5 of them"):
        knapsack(options, {}, 104)
    with pytest.raises(ValueError, match="layer a has no option with a loss"):
        knapsack(Options({"a": (Option(spec, 10),)}, 5), {}, 104)
    with pytest.raises(ValueError, match="the loss of layer a as 2b-g64 is nan; may be finite"):
        knapsack(options, {("a", "2b-g64"): float("nan")}, 104)
