"""Measures what one core multiplies in float32, in a process of its own.

    python jobs/forecast/measure_core.py      # prints operations per second

Run as a file with numpy's BLAS held to one thread (`jobs.forecast.place`): it imports nothing but
numpy, so it takes a fraction of a second on a machine where torch would take several.
"""

from __future__ import annotations

import time

SIZE = 192  # three matrices of 147 kB fit into a core's second cache
SECONDS = 0.05


def float32_flops() -> float:
    """Operations per second of a product of matrices: of its best repetition."""
    import numpy as np

    matrix = np.random.default_rng(0).random((SIZE, SIZE), dtype=np.float32)
    result = matrix @ matrix
    best, ends = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < ends:
        began = time.perf_counter()
        np.matmul(matrix, matrix, out=result)
        best = min(best, time.perf_counter() - began)
    return 2.0 * SIZE**3 / best


if __name__ == "__main__":
    print(float32_flops())
