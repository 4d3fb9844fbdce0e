"""Allocations worth measuring whole: losses of layers do not add up exactly, so the allocation of
the least predicted sum need not be the best one.

Uniform models to hold an allocated one against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from quant.allocation.knapsack import Losses, knapsack
from quant.allocation.options import Option, Options
from quant.allocation.steps import Chosen, Steps
from quant.quant_spec import QuantSpec


@dataclass(frozen=True)
class Allocation:
    """layers: how each is quantized, None for 16 bits; what `quantize` takes. bytes: of the whole
    model's file. predicted: the sum of the layers' losses."""

    layers: dict[str, QuantSpec | None]
    bytes: int
    predicted: float


def candidates(
    options: Options, losses: Losses, budget_bytes: int, count: int = 4
) -> list[Allocation]:
    """At most `count` distinct allocations within `budget_bytes`, to be measured end to end.

    losses: KL by layer and key of the option, see `knapsack`. In this order, none twice, each
    filled up to the budget: the least sum of losses; the least sum of their square roots, as if
    the errors of layers added up instead of their squares; the best uniform model with the bytes
    that it leaves spent, so that the best of all is no worse; one group size for all; the least
    sums of other powers, above 1 to even losses out.

    Raises ValueError (one line, with the numbers) for a budget that is too small, or that holds
    the 16-bit model whole.
    """
    if count < 1:
        raise ValueError(f"count is {count}; may be 1 or more")
    if budget_bytes >= options.sixteen_bit:
        raise ValueError(
            f"a budget of {budget_bytes:,} bytes holds the 16-bit model of "
            f"{options.sixteen_bit:,} bytes whole; may be less than that"
        )
    losses = {key: max(loss, 0.0) for key, loss in losses.items()}  # rounding errors
    steps = Steps(options, losses)
    found: list[Allocation] = []
    for chosen in _choices(options, losses, budget_bytes, steps):
        made = allocation(steps, steps.filled(chosen, budget_bytes))
        if all(made.layers != other.layers for other in found):
            found.append(made)
        if len(found) == count:
            break
    return found


def allocation(steps: Steps, chosen: Chosen) -> Allocation:
    """The allocation of one option for each layer."""
    layers = {name: option.spec for name, option in chosen.items()}
    return Allocation(layers, steps.options.total(chosen), steps.predicted(chosen))


def _choices(
    options: Options, losses: Losses, budget: int, steps: Steps
) -> Iterator[dict[str, Option]]:
    def by_power(power: float) -> dict[str, Option]:
        return knapsack(options, {key: loss**power for key, loss in losses.items()}, budget)

    yield by_power(1)
    yield by_power(0.5)
    yield from _uniform(options, steps, budget)
    yield from _one_group_size(options, losses, budget, steps)
    yield from map(by_power, (2, 0.75, 1.5))


def _uniform(options: Options, steps: Steps, budget: int) -> Iterator[dict[str, Option]]:
    """The uniform model of the least sum of losses, if there is one within the budget."""
    found = []
    for spec in _specs(options):
        chosen = {
            name: next((option for option in each if option.spec == spec), None)
            for name, each in options.layers.items()
        }
        whole = {name: option for name, option in chosen.items() if option is not None}
        if len(whole) == len(chosen) and options.total(whole) <= budget:
            try:
                found.append((steps.predicted(whole), spec.bits, whole))
            except ValueError:  # not measured for every layer
                continue
    if found:
        yield min(found, key=lambda item: item[:2])[2]


def _one_group_size(
    options: Options, losses: Losses, budget: int, steps: Steps
) -> Iterator[dict[str, Option]]:
    """For each group size the best choice with that alone, where a layer has it; best first."""
    sizes = list(dict.fromkeys(spec.group_size for spec in _specs(options)))
    found = []
    for size in sizes if len(sizes) > 1 else []:
        layers = {}
        for name, each in options.layers.items():
            kept = tuple(o for o in each if o.spec is None or o.spec.group_size == size)
            layers[name] = kept if len(kept) > 1 else each
        try:
            found.append(knapsack(replace(options, layers=layers), losses, budget))
        except ValueError:  # its smallest model exceeds the budget
            continue
    yield from sorted(found, key=steps.predicted)


def _specs(options: Options) -> list[QuantSpec]:
    """Every spec of any layer, in order."""
    return list(
        dict.fromkeys(
            o.spec for each in options.layers.values() for o in each if o.spec is not None
        )
    )


def uniform_controls(
    uniform: Mapping[QuantSpec, int], allocation_bytes: int, budget_bytes: int
) -> list[QuantSpec]:
    """The uniform specs that an allocation of `allocation_bytes` must beat, one or two.

    uniform: bytes of the model by spec. The smallest one that is no smaller than the allocation,
    where there is one; and the largest within the budget, which is what a user without allocation
    would take. Of several of one size the one of most bits.
    """
    larger = [
        (size, -spec.bits, spec) for spec, size in uniform.items() if size >= allocation_bytes
    ]
    within = [(-size, -spec.bits, spec) for spec, size in uniform.items() if size <= budget_bytes]
    found = [min(some, key=lambda item: item[:2])[2] for some in (larger, within) if some]
    return list(dict.fromkeys(found))
