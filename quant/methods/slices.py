"""Work on a weight's groups in slices that stay in a core's cache, one Python thread per core.

torch splits an operation among OpenMP threads of its own from `SLICE` elements on. Beside the
threads here these would be too many, and they go on spinning for milliseconds after each
operation; a slice is smaller, so that no thread count needs to be changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]  # of groups, ascending

SLICE = 32768  # at::internal::GRAIN_SIZE; 128 KiB in float32: a few fit a core's cache
SPARE = 3
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def runs(count: int, most: int = SLICE - 1) -> list[slice]:
    """`count` elements in consecutive slices of at most `most`."""
    return [slice(first, min(first + most, count)) for first in range(0, count, most)]


class Room:
    """One thread's buffers for a slice: 128 KiB allocated anew cost more than the arithmetic.

    There is room for `SPARE` groups more.
    """

    def __init__(self, groups: Tensor, most: int) -> None:
        size, most = groups.shape[1], most + SPARE
        self.groups = groups
        # numpy knows no bfloat16: as integers of that width.
        self.words = groups.view(_WORDS[groups.itemsize]).numpy()
        self.raw = torch.empty(most, size, dtype=groups.dtype)
        self.raw_words = self.raw.view(_WORDS[groups.itemsize]).numpy()
        self.wide = torch.empty(most, size)
        self.space = torch.empty(most, size)
        self.mean = torch.empty(most)
        self.errors = np.empty(most)
        self.large: Floats = np.empty(most, np.float32)
        self.moved: Numbers = np.empty(most, np.int64)

    def rows(self, picked: Numbers) -> Tensor:
        """The picked groups `[n, size]` in float32; valid until the next call."""
        first, count = int(picked[0]), len(picked)
        if picked[-1] - first == count - 1:
            part = self.groups[first : first + count]
        else:
            # By numpy, as torch shares out a gather of so many; "clip" lets it write in place.
            np.take(self.words, picked, axis=0, out=self.raw_words[:count], mode="clip")
            part = self.raw[:count]
        return part if part.dtype == torch.float32 else self.wide[:count].copy_(part)


class Slices:
    """Runs functions over the groups `[groups, size]` of a weight on the CPU; a context manager.

    Has as many threads as torch (`torch.get_num_threads()`), but none for which there is no slice.
    """

    def __init__(self, groups: Tensor) -> None:
        self.groups = groups
        self.most = max((SLICE - 1) // groups.shape[1], 1)
        threads = min(torch.get_num_threads(), math.ceil(len(groups) / self.most))
        self.rooms = [Room(groups, self.most) for _ in range(threads)]
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __enter__(self) -> Slices:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown()

    def map(self, work: Callable[[Room, Numbers], T], groups: Numbers) -> list[T]:
        """`work` of every slice of these groups; its results in order."""
        parts = runs(len(groups), self.most)

        def share(index: int) -> list[T]:
            mine = parts[index :: len(self.rooms)]
            return [work(self.rooms[index], groups[part]) for part in mine]

        if self.pool is None or len(parts) == 1:
            return [result for index in range(len(self.rooms)) for result in share(index)]
        shares = list(self.pool.map(share, range(len(self.rooms))))
        return [shares[i % len(shares)][i // len(shares)] for i in range(len(parts))]
