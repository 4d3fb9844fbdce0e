"""hqq's search for zero points, its steps to the last bit but fewer passes over memory.

hqq repeats one step for all groups of the matrix, until the mean error over the whole matrix falls
no more (`optimize_weights_proximal_legacy`). Here the steps are made slice by slice, and less is
done:
- A step's shrinkage is exactly 0 wherever the error is below a bound that hqq's settings give, 0.17
  for weights of any scale, and then no power is needed. Groups with a larger error go through hqq's
  own function.
- A group whose zero point a step leaves as it is has settled: every later step leaves it too, with
  the same error. Only the others are gone through again: after six steps a fifth, of groups of 64.
- The order of the sum of errors matters only where two steps' errors agree to some digits. From
  there on each is taken as hqq takes it: torch's mean of all deviations.

Equal to hqq with as many torch threads. hqq itself, with another count, may differ in the last bit:
by the order of its mean, and by pow where a thread's share ends amid a vector.

The loops are fused: what torch would do in a dozen passes over memory, in one. Each rounds as the
torch operations it names do, element by element: float32 throughout, one operation at a time, a
true division. They let go of the GIL. Arrays: weight, space, out `[n, size]`; picked int64 `[n]`,
the groups that these rows are; scale and zero float32 `[groups]`, hqq's (the scale is the inverse
one); large and new float32 `[n]`, errors float64 `[n]`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hqq.core.optimize import optimize_weights_proximal_legacy, shrink_lp_op
from numba import njit
from torch import Tensor

from quant.methods.slices import Floats, Numbers, Slices

# The sum of errors in any order, so that it is a vector sum. Changes no element: nothing else in
# the loop can be reordered, and products are not fused into sums without "contract".
_SUMS = {"reassoc", "nnan", "nsz"}
_0 = np.float32(0)
_1 = np.float32(1)


def _jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compiles at the first call; kept on disk for later processes where that can be written."""

    def wrap(function: Callable[..., Any]) -> Any:  # noqa: ANN401
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


# Two mean errors closer than this, relatively, are compared as torch's float32 means. These are
# within 1e-7 of the true means of random numbers, within 1.1e-6 of that of 65 million equal ones.
TIE = 3e-6
VECTORS = 32  # elements that torch takes at once, or a multiple: two vectors of AVX-512

_OPTIONS = inspect.signature(optimize_weights_proximal_legacy).parameters["opt_params"].default
_BETA, _NORM = _OPTIONS["beta"], _OPTIONS["lp_norm"]
# Shrunk is max(|x| - |x|^(p - 1) / beta, 0): 0 up to |x| = beta^(-1 / (2 - p)). A little less than
# that, for rounding.
LIMIT = np.float32(0.999 * _BETA ** (-1 / (2 - _NORM)))


class Search:
    """Moves `zero` to the zero points with which hqq's search ends, in place.

    scale, zero: float32 `[groups]`, where hqq begins; the scale is hqq's, the inverse one.
    top: the highest code.
    """

    def __init__(self, slices: Slices, scale: Floats, zero: Floats, top: int) -> None:
        self.slices, self.scale, self.zero, self.top = slices, scale, zero, top
        groups, size = slices.groups.shape
        self.all: Numbers = np.arange(groups)
        # Vectors begin anew every `period` groups; those from `tail` on do not fill them.
        self.period = VECTORS // math.gcd(size, VECTORS)
        self.tail = groups - groups % self.period

    def run(self) -> None:
        active, settled, best = self.all, 0.0, math.inf
        steps: list[tuple[Numbers, Floats]] = []  # groups and their zero points before the step
        exact: _ExactError | None = None
        for _ in range(_OPTIONS["iters"]):
            steps = [*steps[-1:], (active, self.zero[active])]
            results = [self._step(part, rows) for part, rows in self.slices.split(active)]
            error = settled + sum(moving + still for _, moving, still in results)
            if exact is None and abs(best - error) <= TIE * error:
                before = self.zero.copy()
                for groups, zero in reversed(steps):
                    before[groups] = zero
                exact = _ExactError(self, before)
                best = exact.mean()
            if exact is not None:
                exact.update(*steps[-1])
                error = exact.mean()
            # What hqq stops after is a step, so this one's zero points hold.
            if not error < best:
                break
            best = error
            settled += sum(still for _, _, still in results)
            active = np.concatenate([moved for moved, _, _ in results])
            if not len(active):
                break

    def encode(self, out: Tensor) -> None:
        """Put the codes with the present zero points into `out`, uint8 `[groups, size]`."""
        codes, top = out.numpy(), np.float32(self.top)
        for part, rows in self.slices.split(self.all):
            encode(rows.numpy(), part, self.scale, self.zero, top, codes)

    def _step(self, groups: Numbers, rows: Tensor) -> tuple[Numbers, float, float]:
        """One step of these groups: which moved, the errors before it of those and of the rest."""
        count, buffers = len(groups), self.slices
        space, mean = buffers.space[:count], buffers.mean[:count]
        found = step(
            rows.numpy(),
            groups,
            self.scale,
            self.zero,
            np.float32(self.top),
            LIMIT,
            space.numpy(),
            buffers.errors,
            buffers.large,
        )
        torch.mean(space, dim=1, out=mean)
        new = mean.numpy()
        if found:
            self._shrink(groups, buffers.large[:count] > 0, new)
        moved, moving, still = settle(groups, new, buffers.errors, self.zero, buffers.moved)
        return buffers.moved[:moved].copy(), moving, still

    def _shrink(self, groups: Numbers, large: np.ndarray, new: Floats) -> None:
        """Put hqq's own step of the groups with `large` errors into `new`.

        torch's pow of an element is another one, in the last bit, within a vector and behind the
        last: so those within the matrix's vectors are padded to vectors, and its end taken whole.
        """
        body = large & (groups < self.tail)
        if body.any():
            picked = groups[body]
            padded = -len(picked) % self.period
            step = self._hqq_step(np.concatenate([picked, np.repeat(picked[:1], padded)]))
            new[body] = step[: len(picked)]
        end = large & (groups >= self.tail)
        if end.any():
            new[end] = self._hqq_step(self.all[self.tail :])[groups[end] - self.tail]

    def _hqq_step(self, groups: Numbers) -> Floats:
        """The zero points of `optimize_weights_proximal_legacy_step`, of at most a slice."""
        rows = self.slices.rows(groups)
        codes, missing = torch.empty_like(rows), torch.empty_like(rows)
        # Not torch.round: torch wakes its threads for it from 2,048 elements on.
        top = np.float32(self.top)
        miss(rows.numpy(), groups, self.scale, self.zero, top, codes.numpy(), missing.numpy())
        shrunk = shrink_lp_op(missing, _BETA, _NORM)
        scale = torch.from_numpy(self.scale[groups, None])
        return torch.mean(codes - (rows - shrunk) * scale, dim=1).numpy()


class _ExactError:
    """The mean error as hqq takes it, in float32, which needs all deviations at once."""

    def __init__(self, search: Search, zero: Floats) -> None:
        self.search, self.zero = search, zero
        self.deviations: Tensor = torch.empty(search.slices.groups.shape)
        self.update(search.all, zero)

    def update(self, groups: Numbers, zero: Floats) -> None:
        """Let these groups have these zero points."""
        self.zero[groups] = zero
        search, out = self.search, self.deviations.numpy()
        for part, rows in search.slices.split(groups):
            top = np.float32(search.top)
            deviate(rows.numpy(), part, search.scale, self.zero, top, out)

    def mean(self) -> float:
        return float(self.deviations.mean())
