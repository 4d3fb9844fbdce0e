"""Greedy steps against the plain greedy algorithm, which looks at every step every time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.allocation import Option, Options
from quant.allocation.steps import Steps
from quant.quant_spec import QuantSpec

BITS = (1, 2, 3, 4, 5, 6, 8)
# Primes apart, so that no two steps are equally good and the order is the only right one.
ROW = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 997)), min_size=2, max_size=6)
ROWS = st.lists(ROW, min_size=1, max_size=4)


def steps_of(rows: list[list[tuple[int, int]]]) -> Steps:
    layers, losses = {}, {}
    for number, row in enumerate(rows):
        options = [Option(QuantSpec(BITS[at], 8), size) for at, (size, _) in enumerate(row)]
        layers[f"l{number}"] = tuple(sorted(options, key=lambda option: option.bytes))
        for at, (option, (_, loss)) in enumerate(zip(options, row, strict=True)):
            losses[f"l{number}", option.key] = loss + 1e-3 * (17 * number + at) ** 0.5
    return Steps(Options(layers, 11), losses)


def greedy(steps: Steps, chosen: dict, budget: int, fixed: set, up: bool) -> dict | None:
    made = dict(chosen)
    for name in made.keys() - fixed if up else ():  # what is better in as few bytes
        same = [(loss, o) for o, loss in steps.ladders[name] if o.bytes <= made[name].bytes]
        if same and min(same, key=lambda pair: pair[0])[0] < steps.loss(name, made[name]):
            made[name] = min(same, key=lambda pair: pair[0])[1]
    while up or steps.options.total(made) > budget:
        possible = []
        for name in made.keys() - fixed:
            now = made[name]
            for option, loss in steps.ladders[name]:
                gain, more = steps.loss(name, now) - loss, option.bytes - now.bytes
                fits = steps.options.total(made) + more <= budget
                if up and gain > 0 and fits:
                    possible.append((-gain / more, name, option))
                if not up and more < 0:
                    possible.append((gain / more, name, option))
        if not possible:
            return made if up else None
        _, name, made[name] = min(possible, key=lambda item: item[:2])
    return made


@settings(max_examples=200, deadline=None)
@given(ROWS, st.integers(0, 250), st.booleans(), st.integers(0, 5))
def test_filled_takes_the_best_step_that_fits_until_none_does(rows, budget, fix, start):
    steps = steps_of(rows)
    every = steps.options.layers.items()
    chosen = {name: options[start % len(options)] for name, options in every}
    fixed = {"l0"} if fix else set()
    expected = greedy(steps, chosen, budget, fixed, up=True)
    assert steps.filled(chosen, budget, fixed) == expected
    assert chosen == {name: options[start % len(options)] for name, options in every}, "a copy"


@settings(max_examples=200, deadline=None)
@given(ROWS, st.integers(0, 250), st.booleans())
def test_repaired_takes_the_cheapest_step_until_it_fits(rows, budget, fix):
    steps = steps_of(rows)
    chosen = {name: options[-1] for name, options in steps.options.layers.items()}
    fixed = {"l0"} if fix else set()
    expected = greedy(steps, chosen, budget, fixed, up=False)
    assert steps.repaired(chosen, budget, fixed) == expected
    if expected is not None:
        assert steps.options.total(expected) <= budget


def test_price_is_what_one_more_byte_would_save():
    steps = steps_of([[(10, 900), (20, 500), (60, 100)], [(10, 50), (30, 40)]])
    chosen = {name: ladder[0][0] for name, ladder in steps.ladders.items()}
    assert steps.price(chosen) == pytest.approx(40, rel=1e-3)
    largest = {name: ladder[-1][0] for name, ladder in steps.ladders.items()}
    assert steps.price(largest) == 0


def test_an_option_that_was_not_measured_has_no_loss():
    options = Options({"a": (Option(QuantSpec(2, 8), 1), Option(QuantSpec(4, 8), 2))}, 0)
    steps = Steps(options, {("a", "4b-g8"): 1.0})
    assert [option.key for option, _ in steps.ladders["a"]] == ["4b-g8"]
    with pytest.raises(ValueError, match="layer a as 2b-g8 has no loss"):
        steps.loss("a", options.layers["a"][0])
