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
"""

from __future__ import annotations

import inspect
import math

import numpy as np
import torch
from hqq.core.optimize import optimize_weights_proximal_legacy, shrink_lp_op
from torch import Tensor

from quant.methods import loops
from quant.methods.slices import Floats, Numbers, Slices

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
            loops.encode(rows.numpy(), part, self.scale, self.zero, top, codes)

    def _step(self, groups: Numbers, rows: Tensor) -> tuple[Numbers, float, float]:
        """One step of these groups: which moved, the errors before it of those and of the rest."""
        count, buffers = len(groups), self.slices
        space, mean = buffers.space[:count], buffers.mean[:count]
        found = loops.step(
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
        moved, moving, still = loops.settle(groups, new, buffers.errors, self.zero, buffers.moved)
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
        loops.miss(rows.numpy(), groups, self.scale, self.zero, top, codes.numpy(), missing.numpy())
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
            loops.deviate(rows.numpy(), part, search.scale, self.zero, top, out)

    def mean(self) -> float:
        return float(self.deviations.mean())
