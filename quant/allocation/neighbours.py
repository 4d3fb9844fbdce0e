"""Allocations near a good one, for a hill climb that measures them whole.

A neighbour moves bytes to some layers from the others, or away from them. On the sum of losses no
move from the best allocation gains; measured whole one may, since losses do not add up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import zip_longest

from quant.allocation.candidates import Allocation, allocation
from quant.allocation.knapsack import Losses
from quant.allocation.options import Option, Options
from quant.allocation.steps import Steps

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
