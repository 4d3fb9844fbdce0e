"""How the next token may be drawn: the settings and their ranges, without anything heavy."""

from __future__ import annotations

import math

LEAST_TEMPERATURE = 1e-4  # below, logits over it leave float32
MOST_SEED = 2**63 - 1  # what torch's generators take


def draw_faults(temperature: float, top_p: float | None, seed: int | None) -> list[tuple[str, str]]:
    """(setting, what is wrong with it: what it is; what it may be), for each out of its range.

    temperature 0 takes the likeliest token, and draws nothing.
    """
    faults = []
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        faults.append(
            (
                "temperature",
                f"got {temperature:g}; may be 0 (the likeliest token), or "
                f"{LEAST_TEMPERATURE} and more",
            )
        )
    if top_p is not None and not 0 < top_p <= 1:
        faults.append(("top_p", f"got {top_p:g}; may be above 0, up to 1"))
    if seed is not None and not 0 <= seed <= MOST_SEED:
        faults.append(("seed", f"got {seed}; may be 0 to {MOST_SEED}"))
    return faults
