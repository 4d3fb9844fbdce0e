"""Uniform models to hold an allocated one against."""

from __future__ import annotations

from collections.abc import Mapping

from quant.spec import QuantSpec


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
