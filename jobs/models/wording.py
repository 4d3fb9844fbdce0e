"""Faults of `quant` in the words of the command line's options."""

from __future__ import annotations

from collections.abc import Iterable

from quant.unsupported import Wording


class OptionWording(Wording):
    """`--layer GLOB=BITS`, `--embeddings`, `--head`."""

    def entry(self, pattern: object) -> str:
        return f"--layer {pattern}:"

    def keep(self, patterns: Iterable[str]) -> str:
        return " ".join(f"--layer '{pattern}=16'" for pattern in patterns)

    def kept(self) -> str:
        return "what --layer leaves in 16 bits"

    def sixteen(self) -> str:
        return "16"

    def without(self, flag: str) -> str:
        return f"--{flag} is not given"
