"""How models' figures read on a terminal."""

from __future__ import annotations

from jobs.caches.show import size

__all__ = ["bits", "rate", "seconds", "size"]


def bits(value: float) -> str:
    """Bits per weight."""
    return f"{value:.2f}"


def seconds(value: float) -> str:
    """A duration."""
    return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s"


def rate(value: float | None) -> str:
    """Tokens per second."""
    if value is None:
        return "– tokens/s"
    return f"{value:,.0f} tokens/s" if value >= 100 else f"{value:.3g} tokens/s"
