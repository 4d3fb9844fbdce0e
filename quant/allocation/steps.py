"""Small changes to a choice of options: bytes left over are spent, bytes too many are saved."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping

from quant.allocation.knapsack import Losses, loss_of, undominated
from quant.allocation.options import Option, Options

Chosen = Mapping[str, Option]


class Steps:
    """The steps from one option of a layer to another, with what each costs in bytes and loss.

    ladders: of each layer the options that no other beats in both, smallest first. Raises
    ValueError as `undominated` does.
    """

    def __init__(self, options: Options, losses: Losses) -> None:
        self.options = options
        self.ladders = {
            name: undominated(name, found, losses) for name, found in options.layers.items()
        }
        self._losses = {
            (name, option.key): loss_of(name, option, losses)
            for name, found in options.layers.items()
            for option in found
        }

    def loss(self, name: str, option: Option) -> float:
        """The loss of an option. Raises ValueError when it was not measured."""
        loss = self._losses[name, option.key]
        if loss is None:
            raise ValueError(f"layer {name} as {option.key} has no loss: it was not measured")
        return loss

    def predicted(self, chosen: Chosen) -> float:
        """The sum of losses, as if they added up."""
        return sum(self.loss(name, option) for name, option in chosen.items())

    def price(self, chosen: Chosen) -> float:
        """Loss that one more byte would save at best, by a whole step of one layer."""
        rates = [
            (self.loss(name, now) - loss) / (option.bytes - now.bytes)
            for name, now in chosen.items()
            for option, loss in self.ladders[name]
            if option.bytes > now.bytes
        ]
        return max(0.0, *rates) if rates else 0.0

    def filled(self, chosen: Chosen, budget: int, fixed: Collection[str] = ()) -> dict[str, Option]:
        """`chosen` with what it leaves of `budget` bytes spent: first what is better in as few
        bytes, then again and again the step that gains most for its bytes, of those that fit.
        Layers of `fixed` are left as they are."""
        made = dict(chosen)
        names = made.keys() - set(fixed)
        for name in names:
            made[name] = self._undominated(name, made[name])
        free = budget - self.options.total(made)
        heap: list[tuple[float, str, str, int]] = []
        for name in names:
            for item in self._up(name, made[name]):
                heapq.heappush(heap, item)
        while heap:
            _, name, was, at = heapq.heappop(heap)
            now, option = made[name], self.ladders[name][at][0]
            if now.key == was and option.bytes - now.bytes <= free:
                free -= option.bytes - now.bytes
                made[name] = option
                for item in self._up(name, option):
                    heapq.heappush(heap, item)
        return made

    def repaired(
        self, chosen: Chosen, budget: int, fixed: Collection[str] = ()
    ) -> dict[str, Option] | None:
        """`chosen` brought within `budget` bytes: again and again the step that loses least for
        its bytes. Layers of `fixed` are left as they are; None when that cannot be done."""
        made = dict(chosen)
        excess = self.options.total(made) - budget
        heap: list[tuple[float, str, str, int]] = []
        for name in made.keys() - set(fixed):
            for item in self._down(name, made[name]):
                heapq.heappush(heap, item)
        while excess > 0 and heap:
            _, name, was, at = heapq.heappop(heap)
            now, option = made[name], self.ladders[name][at][0]
            if now.key == was:
                excess -= now.bytes - option.bytes
                made[name] = option
                for item in self._down(name, option):
                    heapq.heappush(heap, item)
        return made if excess <= 0 else None

    def _undominated(self, name: str, now: Option) -> Option:
        """The option of least loss in as few bytes; `now` itself if none has less."""
        loss, found = self.loss(name, now), now
        for option, own in self.ladders[name]:
            if option.bytes <= now.bytes and own < loss:
                loss, found = own, option
        return found

    def _up(self, name: str, now: Option) -> Iterator[tuple[float, str, str, int]]:
        """(-gain per byte, layer, key of now, place on the ladder) of the options of less loss."""
        for at, (option, loss) in enumerate(self.ladders[name]):
            gain, more = self.loss(name, now) - loss, option.bytes - now.bytes
            if gain > 0:  # and more > 0: nothing beats `now` in both
                yield -gain / more, name, now.key, at

    def _down(self, name: str, now: Option) -> Iterator[tuple[float, str, str, int]]:
        """(loss per byte saved, layer, key of now, place on the ladder) of the smaller options."""
        for at, (option, loss) in enumerate(self.ladders[name]):
            if option.bytes < now.bytes:
                lost = loss - self.loss(name, now)
                yield lost / (now.bytes - option.bytes), name, now.key, at
