"""How long something will take yet, from how far it has come since it was first looked at."""

from __future__ import annotations

# Sooner than that a guess is worth nothing.
LEAST_S = 5.0


class Remaining:
    """Estimates for several things at once, each by its name."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, float]] = {}
        self._last: dict[str, float] = {}

    def seconds(self, name: str, share: float, now: float) -> float | None:
        """Seconds left of `name`, of which that share is done at the time `now`; None if unknown.

        A share that falls is a new beginning.
        """
        if share < self._last.get(name, 2.0):
            self._first[name] = (now, share)
        self._last[name] = share
        began, before = self._first[name]
        if share >= 1 or share <= before or now - began < LEAST_S:
            return None
        return (now - began) * (1 - share) / (share - before)


def in_words(seconds: float) -> str:
    """ "about 40 s left", "about 12 min left", "about 3.5 h left"."""
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} s left"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"
