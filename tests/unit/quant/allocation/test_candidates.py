"""Allocations to be measured, their neighbours, and the uniform models they must beat."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from quant.allocation import (
    Allocation,
    candidates,
    layer_options,
    neighbours,
    sensitivity,
    shards_of,
    uniform_bytes,
    uniform_controls,
)
from quant.artifact.sizes import true_bytes
from quant.evaluation.evaluate import evaluate
from quant.methods import quantize_weight
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from tests.unit.quant.conftest import Batch

BASE = QuantSpec(4, 32)
CHOICES = [(8, 32), (4, 64), (4, 32), (3, 64), (3, 32), (2, 64), (2, 32)]


@pytest.fixture
def options(make_llama):
    return layer_options(make_llama(num_hidden_layers=3), BASE, CHOICES)


@pytest.fixture
def losses(options):
    """Losses that fall fourfold with each bit, of layers that differ a hundredfold."""
    rng = np.random.default_rng(0)
    found = {}
    for name, each in options.layers.items():
        weight = rng.lognormal(0, 1.5)
        for option in each:
            if option.spec is not None:
                bits = 8 * option.bytes / each[-1].bytes * 2
                found[name, option.key] = float(weight * 4**-bits * rng.lognormal(0, 0.1))
    return found


def uniform(options, losses, spec) -> Allocation:
    chosen = options.of(dict.fromkeys(options.layers, spec))
    predicted = sum(losses[name, option.key] for name, option in chosen.items())
    return Allocation(dict.fromkeys(options.layers, spec), options.total(chosen), predicted)


@pytest.mark.parametrize("spec", [QuantSpec(2, 32), QuantSpec(3, 64), QuantSpec(4, 64)])
@pytest.mark.parametrize("spare", [0, 1, 5000])
def test_candidates_are_distinct_full_and_one_is_no_worse_than_uniform(
    options, losses, spec, spare
):
    plain = uniform(options, losses, spec)
    budget = plain.bytes + spare
    found = candidates(options, losses, budget, 4)
    assert len(found) == 4
    assert len({tuple(each.layers.values()) for each in found}) == 4
    for each in found:
        chosen = options.of(each.layers)
        assert each.bytes == options.total(chosen) <= budget
        assert each.predicted == pytest.approx(
            sum(losses.get((name, option.key), 0.0) for name, option in chosen.items())
        )
        # Nothing that gains anything fits what is left.
        for name, option in chosen.items():
            for other in options.layers[name]:
                if losses.get((name, other.key), 0.0) < losses.get((name, option.key), 0.0):
                    assert each.bytes + other.bytes - option.bytes > budget
    assert found[0].predicted == min(each.predicted for each in found) < plain.predicted
    assert candidates(options, losses, budget, 2) == found[:2]
    if spare == 0:
        assert plain.layers in [each.layers for each in found]


def test_the_smallest_budget_has_one_allocation_and_less_is_refused(options, losses):
    [only] = candidates(options, losses, options.smallest)
    assert set(only.layers.values()) == {QuantSpec(2, 64)} and only.bytes == options.smallest
    with pytest.raises(ValueError, match=f"too small: .* gives {options.smallest:,} bytes"):
        candidates(options, losses, options.smallest - 1)
    with pytest.raises(ValueError, match="holds the 16-bit model of .* whole"):
        candidates(options, losses, options.sixteen_bit)
    almost = candidates(options, losses, options.sixteen_bit - 1)
    assert all(any(spec is not None for spec in each.layers.values()) for each in almost)
    with pytest.raises(ValueError, match="count is 0"):
        candidates(options, losses, options.smallest, 0)


def test_losses_that_are_missing_or_below_zero_by_rounding(options, losses):
    first = next(iter(options.layers))
    some = {key: loss for key, loss in losses.items() if key[0] != first or key[1] == "3b-g64"}
    some[list(options.layers)[1], "8b-g32"] = -1e-9
    budget = uniform(options, losses, QuantSpec(4, 64)).bytes
    for each in candidates(options, some, budget, 8):
        assert each.layers[first] in (QuantSpec(3, 64), None) and each.predicted >= 0


def test_neighbours_are_other_allocations_within_the_budget(options, losses):
    budget = uniform(options, losses, QuantSpec(3, 64)).bytes
    start = candidates(options, losses, budget)[0]
    found = neighbours(options, start, losses, budget, 12)
    assert len(found) == 12
    assert len({tuple(each.layers.values()) for each in (start, *found)}) == 13
    for each in found:
        assert each.bytes == options.total(options.of(each.layers)) <= budget
        assert each.predicted >= start.predicted, "the best sum has no better neighbour"
    assert neighbours(options, start, losses, budget, 3) == found[:3]
    several = [
        sum(each.layers[name] != start.layers[name] for name in start.layers) for each in found
    ]
    assert min(several) <= 3 < max(several), "small moves and large ones"
    names = {name.rpartition(".")[2] for name in options.layers}
    moved = set()
    for each in neighbours(options, start, losses, budget, 200):
        before, after = options.of(start.layers), options.of(each.layers)
        more = {name for name in before if after[name].bytes > before[name].bytes}
        less = {name for name in before if after[name].bytes < before[name].bytes}
        for last in names:
            same = {name for name in before if name.endswith(last)}
            moved |= {side for side, some in (("up", more), ("down", less)) if some == same}
    assert moved == {"up", "down"}, "layers of one name move together, both ways"


def test_neighbours_lead_down_from_a_bad_start(options, losses):
    spec = QuantSpec(3, 64)
    at = uniform(options, losses, spec)
    budget, best = at.bytes, candidates(options, losses, at.bytes)[0]
    for _ in range(40):
        near = neighbours(options, at, losses, budget, 4)
        lower = min(near, key=lambda each: each.predicted)
        if lower.predicted >= at.predicted:
            break
        at = lower
    assert best.predicted <= at.predicted <= 1.05 * best.predicted


def test_the_best_measured_is_among_the_best_there_are():
    """Every allocation of 7 layers and 2 options is measured whole, and few beat the one found."""
    from tests.unit.quant.conftest import tiny_llama

    def model():
        return tiny_llama(num_hidden_layers=1, vocab_size=64)

    rng = np.random.default_rng(1)
    ids = rng.integers(0, 64, (6, 24))
    mask = np.ones(ids.shape, np.float32)
    mask[:, -1] = 0
    batches = [Batch(ids, np.tile(np.arange(24), (6, 1)), mask)]
    options = layer_options(model(), BASE, [(4, 64), (2, 64)])
    [work] = shards_of(options, 1)
    losses = sensitivity(model(), model(), batches, work)
    kl = {key: found["kl"] for key, found in losses.items()}

    weights = {
        (name, option.key): quantize_weight(
            model().get_submodule(name).weight, option.spec.bits, 64
        ).dequantize()
        for name, option in work
    }
    changed, reference = model(), model()
    budget = (options.smallest + uniform_bytes(model(), QuantSpec(4, 64))) // 2
    every = {}
    for choice in itertools.product(*(each[:2] for each in options.layers.values())):
        chosen = dict(zip(options.layers, choice, strict=True))
        if options.total(chosen) <= budget:
            for name, option in chosen.items():
                changed.get_submodule(name).weight.data = weights[name, option.key]
            layers = tuple(option.spec for option in choice)
            every[layers] = evaluate(changed, batches, reference)["kl_to_reference"]

    kl |= {(name, "16b"): 1e9 for name in options.layers}  # no choice here
    tried = candidates(options, kl, budget)
    tried += neighbours(options, tried[0], kl, budget)
    measured = [every[tuple(each.layers.values())] for each in tried]
    assert len(measured) >= 4 and len(every) > 40
    rank = sum(found < min(measured) for found in every.values())
    assert rank <= 0.05 * len(every), (rank, len(every))


def test_an_allocation_is_what_quantize_makes(make_llama, options, losses):
    found = candidates(options, losses, uniform(options, losses, QuantSpec(3, 64)).bytes)[0]
    model = quantize(make_llama(num_hidden_layers=3), BASE, found.layers, torch.float16)
    assert true_bytes(model) == found.bytes


def test_controls_are_the_next_size_up_and_the_largest_within_the_budget():
    sizes = {
        QuantSpec(2, 64): 100,
        QuantSpec(3, 64): 130,
        QuantSpec(2, 16): 130,
        QuantSpec(4, 64): 160,
    }
    two, three, four = QuantSpec(2, 64), QuantSpec(3, 64), QuantSpec(4, 64)
    assert uniform_controls(sizes, 130, 130) == [three], "of equal sizes the one of most bits"
    assert uniform_controls(sizes, 129, 135) == [three]
    assert uniform_controls(sizes, 131, 135) == [four, three]
    assert uniform_controls(sizes, 170, 180) == [four]
    assert uniform_controls(sizes, 90, 95) == [two]
    assert uniform_controls(sizes, 100, 99) == [two]
