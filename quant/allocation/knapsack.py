"""The multiple-choice knapsack: one option for each layer, the least sum of losses, within bytes.

Dynamic programming over bytes (Dudzinski and Walukiewicz, "Exact methods for the knapsack problem
and its generalizations", 1987): `best[b]` is the least loss of the layers so far in exactly b units
of bytes more than the smallest model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from quant.allocation.options import SIXTEEN, Option, Options

CELLS = 1 << 24  # of the table [layers, units of bytes], 1 byte each
UNITS = (20_000, 100_000)  # that the free bytes are at least and at most divided into

Losses = Mapping[tuple[str, str], float]


def knapsack(options: Options, losses: Losses, budget_bytes: int) -> dict[str, Option]:
    """The options, one for each layer, with the least sum of losses within `budget_bytes` in all.

    losses: by layer and key of the option, finite and in any unit; an option without one cannot be
    chosen, 16 bits without one cost nothing. Exact where the free bytes are few units of the
    greatest common divisor of all differences, as they are for models of few shapes; else bytes
    are rounded to larger units. Never above the budget; of equal sums the one of fewer bytes.

    Raises ValueError with the numbers when the smallest model exceeds the budget, and for a loss
    that is not finite.
    """
    layers = {name: undominated(name, found, losses) for name, found in options.layers.items()}
    smallest = options.fixed_bytes + sum(found[0][0].bytes for found in layers.values())
    free = budget_bytes - smallest
    if free < 0:
        raise ValueError(
            f"a budget of {budget_bytes:,} bytes is too small: the smallest choice of every layer "
            f"gives {smallest:,} bytes, {options.fixed_bytes:,} of them of what is not chosen; "
            "allow more bytes, or fewer bits"
        )
    extra = [[option.bytes - found[0][0].bytes for option, _ in found] for found in layers.values()]
    free = min(free, sum(row[-1] for row in extra))
    unit = math.gcd(*(step for row in extra for step in row)) or 1
    units = min(UNITS[1], max(UNITS[0], CELLS // max(1, len(extra))))
    if free // unit > units:
        unit = -(-free // units)
    weights = [[(step + unit // 2) // unit for step in row] for row in extra]
    costs = [[loss for _, loss in found] for found in layers.values()]
    table = _Table(weights, costs, free // unit)
    capacity = free // unit
    while capacity >= 0:
        chosen = table.within(capacity)
        excess = sum(row[at] for row, at in zip(extra, chosen, strict=True)) - free
        if excess <= 0:
            break
        capacity -= -(-excess // unit)  # rounding added up: the table knows what is best for less
    else:
        chosen = [0] * len(extra)
    return {name: found[at][0] for (name, found), at in zip(layers.items(), chosen, strict=True)}


def undominated(
    name: str, options: tuple[Option, ...], losses: Losses
) -> list[tuple[Option, float]]:
    """(option, loss) of those for which no other has less loss in as few bytes; smallest first.

    Raises ValueError when a loss is not finite, or no option of the layer has one.
    """
    kept: list[tuple[Option, float]] = []
    known = [(option, loss_of(name, option, losses)) for option in options]
    measured = [(option, loss) for option, loss in known if loss is not None]
    for option, loss in sorted(measured, key=lambda pair: (pair[0].bytes, pair[1])):
        if not kept or loss < kept[-1][1]:
            kept.append((option, loss))
    if not kept:
        raise ValueError(f"layer {name} has no option with a loss; measure one, or allow 16 bits")
    return kept


def loss_of(name: str, option: Option, losses: Losses) -> float | None:
    """The loss of an option; None: it has none and cannot be chosen. Raises ValueError when it is
    not finite."""
    loss = losses.get((name, option.key), 0.0 if option.key == SIXTEEN else None)
    if loss is not None and not math.isfinite(loss):
        raise ValueError(f"the loss of layer {name} as {option.key} is {loss}; may be finite")
    return loss


class _Table:
    """The least sum of costs of one option of each row, for every sum of weights up to `capacity`.

    The first option of each row weighs nothing.
    """

    def __init__(self, weights: list[list[int]], costs: list[list[float]], capacity: int) -> None:
        self.weights = weights
        best = np.full(capacity + 1, np.inf)
        best[0] = 0.0
        kind = np.uint8 if max(map(len, weights), default=0) < 256 else np.uint16
        self.back = np.zeros((len(weights), capacity + 1), kind)
        for row, (steps, losses) in enumerate(zip(weights, costs, strict=True)):
            before = best
            best = before + losses[0]
            for at, step in enumerate(steps[1:], 1):
                if step > capacity:
                    break
                with_it = before[: capacity + 1 - step] + losses[at]
                better = with_it < best[step:]
                best[step:][better] = with_it[better]
                self.back[row, step:][better] = at
        self.best = best

    def within(self, capacity: int) -> list[int]:
        """Index of the option of each row of the least sum of costs in weights of `capacity`."""
        left = int(self.best[: capacity + 1].argmin())  # the first, of least weight
        chosen = [0] * len(self.weights)
        for row in reversed(range(len(chosen))):
            chosen[row] = int(self.back[row, left])
            left -= self.weights[row][chosen[row]]
        return chosen
