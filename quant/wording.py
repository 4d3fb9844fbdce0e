"""How a fault names what the caller's user wrote: arguments of Python, or options, or keys."""

from __future__ import annotations

from collections.abc import Iterable


class Wording:
    """The words for the argument `layers` and the flags of a `QuantSpec`: Python's own.

    What has users of another kind says it in their words, in a subclass.
    """

    def entry(self, pattern: object) -> str:
        """An entry of `layers`, as a fault begins."""
        return f"layers[{pattern!r}]:"

    def keep(self, patterns: Iterable[str]) -> str:
        """What leaves these modules in 16 bits."""
        return f"layers={{{', '.join(f'{pattern!r}: None' for pattern in patterns)}}}"

    def kept(self) -> str:
        """The modules that `layers` leaves in 16 bits."""
        return "what `layers` lists as None"

    def sixteen(self) -> str:
        """The value of an entry that leaves it in 16 bits."""
        return "None"

    def without(self, flag: str) -> str:
        """That a flag is not set: embeddings or head."""
        return f"{flag}=False"


PYTHON = Wording()
