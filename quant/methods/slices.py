"""A weight's groups on the CPU, in slices that stay in a core's cache, on one thread.

On two cores, two Python threads each with slices of its own take as long, or longer: a slice's work
is so short that they wait for the GIL. torch's own threads take longer still on so little.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]  # of groups, ascending

# From as many elements on, torch wakes its threads (at::internal::GRAIN_SIZE). 128 KiB in float32:
# a few such buffers fit a core's cache.
SLICE = 32768
SPARE = 3  # groups that may be added to a slice: 4 of the least groups, of 8, fill two vectors
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def runs(count: int, most: int = SLICE - 1) -> list[slice]:
    """`count` elements in consecutive slices of at most `most`."""
    return [slice(first, min(first + most, count)) for first in range(0, count, most)]


class Slices:
    """Groups `[groups, size]` of any floating-point type, and buffers for a slice of them.

    Buffers: 128 KiB allocated anew for each slice cost more than the arithmetic. They have room for
    `SPARE` groups more than a slice has.
    """

    def __init__(self, groups: Tensor) -> None:
        self.groups = groups
        size = groups.shape[1]
        self.most = max((SLICE - 1) // size, 1)
        if self.most > SPARE:  # whole vectors, so that nothing is added to fill them: search.py
            self.most -= self.most % (SPARE + 1)
        space = self.most + SPARE
        # numpy knows no bfloat16: as integers of that width.
        self._words = groups.view(_WORDS[groups.itemsize]).numpy()
        self._raw = torch.empty(space, size, dtype=groups.dtype)
        self._raw_words = self._raw.view(_WORDS[groups.itemsize]).numpy()
        self._wide = torch.empty(space, size)
        self.space = torch.empty(space, size)
        self.mean = torch.empty(space)
        self.errors = np.empty(space)
        self.large: Floats = np.empty(space, np.float32)
        self.moved: Numbers = np.empty(space, np.int64)

    def split(self, groups: Numbers) -> Iterator[tuple[Numbers, Tensor]]:
        """Slices of these groups: their numbers, and their weights as of `rows`."""
        for part in runs(len(groups), self.most):
            yield groups[part], self.rows(groups[part])

    def rows(self, picked: Numbers) -> Tensor:
        """At most a slice of groups `[n, size]` in float32; valid until the next call."""
        first, count = int(picked[0]), len(picked)
        if picked[-1] - first == count - 1:
            part = self.groups[first : first + count]
        else:
            # By numpy, as torch wakes its threads for this; "clip" lets it write in place.
            np.take(self._words, picked, axis=0, out=self._raw_words[:count], mode="clip")
            part = self._raw[:count]
        return part if part.dtype == torch.float32 else self._wide[:count].copy_(part)
