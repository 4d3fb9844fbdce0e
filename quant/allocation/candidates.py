"""Allocations worth measuring whole: losses of layers do not add up exactly, so the allocation of
the least predicted sum need not be the best one.

`neighbours` are a hill climb's next ones: they move bytes to some layers from the others, or away
from them. On the sum of losses no move from the best allocation gains; measured whole one may.
`uniform_controls` are uniform models to compare an allocated one with.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

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


LOOKED_AT = 4  # moves that are carried out for each neighbour that is asked for


def neighbours(
    options: Options, start: Allocation, losses: Losses, budget_bytes: int, count: int = 4
) -> list[Allocation]:
    """At most `count` distinct allocations within `budget_bytes`, one move away from `start`.

    A move takes a layer, all layers of one name (`down_proj`) or those of one block a step up or
    down among their options; the others then save what is missing, or spend what is left, where it
    costs least and brings most. Moves of one layer and of many by turns, each kind by the least
    predicted sum of losses. Raises ValueError (one line) for options or losses that do not fit.
    """
    losses = {key: max(loss, 0.0) for key, loss in losses.items()}
    steps = Steps(options, losses)
    chosen = options.of(start.layers)
    price = steps.price(chosen)
    ordered = []
    for groups in (_single(options), _groups(options)):
        moves = [
            (_worth(steps, chosen, moved, price), group, moved)
            for group in groups
            for up in (True, False)
            if (moved := _moved(steps, chosen, group, up)) != chosen
        ]
        likely = heapq.nsmallest(LOOKED_AT * count, moves, key=lambda move: move[:2])
        made = [
            allocation(steps, steps.filled(within, budget_bytes, fixed=group))
            for _, group, moved in likely
            if (within := steps.repaired(moved, budget_bytes, fixed=group)) is not None
        ]
        ordered.append(sorted(made, key=lambda each: (each.predicted, each.bytes)))
    found: list[Allocation] = []
    for pair in zip_longest(*ordered):
        for each in pair:
            if each is not None and all(each.layers != other.layers for other in found):
                found.append(each)
    return found[:count]


def _moved(
    steps: Steps, chosen: dict[str, Option], group: tuple[str, ...], up: bool
) -> dict[str, Option]:
    """`chosen` with every layer of the group a step up or down, where there is one."""
    made = dict(chosen)
    for name in group:
        ladder = [option for option, _ in steps.ladders[name]]
        now = chosen[name].bytes
        beyond = [o for o in ladder if (o.bytes > now if up else o.bytes < now)]
        if beyond:
            made[name] = beyond[0] if up else beyond[-1]
    return made


def _worth(
    steps: Steps, before: dict[str, Option], after: dict[str, Option], price: float
) -> float:
    """What a move costs in losses, its bytes paid or sold at `price` by other layers."""
    return sum(
        steps.loss(name, after[name])
        - steps.loss(name, option)
        + price * (after[name].bytes - option.bytes)
        for name, option in before.items()
        if after[name] is not option
    )


def _single(options: Options) -> Iterator[tuple[str, ...]]:
    yield from ((name,) for name in options.layers)


def _groups(options: Options) -> list[tuple[str, ...]]:
    """The layers of one name, and those of one block: what shares the first number in its name."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in options.layers:
        parts = name.split(".")
        found.setdefault(("name", parts[-1]), []).append(name)
        number = next((part for part in parts if part.isdigit()), None)
        if number is not None:
            found.setdefault(("block", number), []).append(name)
    whole = len(options.layers)
    return [tuple(names) for names in found.values() if 1 < len(names) < whole]
