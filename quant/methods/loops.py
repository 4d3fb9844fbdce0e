"""Fused loops over groups of weights: what torch would do in a dozen passes over memory, in one.

Each rounds as the torch operations it names do, element by element: float32 throughout, one
operation at a time, a true division. They let go of the GIL.
Arrays: weight, space, out `[n, size]`; picked int64 `[n]`, the groups that these rows are; scale
and zero float32 `[groups]`, hqq's (the scale is the inverse one); large and new float32 `[n]`,
errors float64 `[n]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

# The sum of errors in any order, so that it is a vector sum. Changes no element: nothing else in
# the loop can be reordered, and products are not fused into sums without "contract".
_SUMS = {"reassoc", "nnan", "nsz"}
_0 = np.float32(0)
_1 = np.float32(1)


def _jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compiles at the first call; kept on disk for later processes where that can be written."""

    def wrap(function: Callable[..., Any]) -> Any:
        try:
            return njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return njit(nogil=True, error_model="numpy", **options)(function)

    return wrap


@_jit(fastmath=_SUMS)
def step(weight, picked, scale, zero, top, limit, space, errors, large):  # type: ignore[no-untyped-def]
    """`space = codes - weight * scale`, whose mean is the next zero point where nothing is shrunk.

    codes: `round(weight * scale + zero).clamp(0, top)`. errors: per group the sum of
    `|weight - (codes - zero) / scale|`; large: how many of these are `limit` or more. Returns
    whether any is.
    """
    found = False
    for g in range(weight.shape[0]):
        s, z = scale[picked[g]], zero[picked[g]]
        total, many = 0.0, _0
        for j in range(weight.shape[1]):
            w = weight[g, j]
            a = w * s
            q = min(max(np.rint(a + z), _0), top)
            space[g, j] = q - a
            e = abs(w - (q - z) / s)
            total += np.float64(e)
            many += _1 if e >= limit else _0
        errors[g] = total
        large[g] = many
        found |= many > _0
    return found


@_jit()
def miss(weight, picked, scale, zero, top, codes, missing):  # type: ignore[no-untyped-def]
    """`codes` as in `step`, in float32, and `missing = weight - (codes - zero) / scale`."""
    for g in range(weight.shape[0]):
        s, z = scale[picked[g]], zero[picked[g]]
        for j in range(weight.shape[1]):
            w = weight[g, j]
            q = min(max(np.rint(w * s + z), _0), top)
            codes[g, j] = q
            missing[g, j] = w - (q - z) / s


@_jit()
def settle(picked, new, errors, zero, moved):  # type: ignore[no-untyped-def]
    """`zero[picked] = new`; the groups that this changes go to `moved`.

    Returns how many these are, and the sums of their errors and of the others', in float64.
    """
    count, moving, still = 0, 0.0, 0.0
    for g in range(len(picked)):
        if new[g] != zero[picked[g]]:
            zero[picked[g]] = new[g]
            moved[count] = picked[g]
            count += 1
            moving += errors[g]
        else:
            still += errors[g]
    return count, moving, still


@_jit()
def deviate(weight, picked, scale, zero, top, out):  # type: ignore[no-untyped-def]
    """`out[picked] = |weight - (codes - zero) / scale|`, the codes as in `step`."""
    for g in range(weight.shape[0]):
        s, z = scale[picked[g]], zero[picked[g]]
        row = out[picked[g]]
        for j in range(weight.shape[1]):
            w = weight[g, j]
            q = min(max(np.rint(w * s + z), _0), top)
            row[j] = abs(w - (q - z) / s)


@_jit()
def encode(weight, picked, scale, zero, top, out):  # type: ignore[no-untyped-def]
    """`out[picked] = codes` as in `step`, in uint8."""
    for g in range(weight.shape[0]):
        s, z = scale[picked[g]], zero[picked[g]]
        row = out[picked[g]]
        for j in range(weight.shape[1]):
            row[j] = np.uint8(min(max(np.rint(weight[g, j] * s + z), _0), top))
