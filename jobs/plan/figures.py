"""How a plan's figures are written."""

from __future__ import annotations

NOTHING = "–"


def size(value: float | None) -> str:
    """Bytes in the unit that gives one to three digits before the point, 10^3 steps."""
    if value is None:
        return NOTHING
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= 0.9995 * scale:
            return f"{_three(value / scale)} {unit}"
    return f"{value / 1e3:.0f} kB"


def count(value: float) -> str:
    """A number of weights or tokens."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * scale:
            return f"{_three(value / scale)} {unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{_three(seconds / 3600)} h"


def hours(value: float | None) -> str:
    """Device hours."""
    return NOTHING if value is None else f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def _three(value: float) -> str:
    return (
        f"{value:,.2f}" if value < 9.995 else f"{value:,.1f}" if value < 99.95 else f"{value:,.0f}"
    )
