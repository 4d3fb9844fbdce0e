"""How a row of a record becomes symbols: classes, contexts, and the state both ends keep.

A row is: its tail, its number of ids, then for each id in ascending order the gap to the id before
and its value (quantized root of the probability, or count of draws). A symbol's code depends on
its context: a gap's on the id before and on how many ids are left; a value's on the mean of what
is left, as values and tail sum up to one.

A number is a class and plain bits below it: small numbers are classes of their own, larger ones
share a class with those of equal leading bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

_KERNELS = ("contexts.py", "rans.py", "decoder.py", "encoder.py")
_SOURCES = hashlib.blake2b(
    b"".join(Path(__file__).with_name(name).read_bytes() for name in _KERNELS), digest_size=6
).hexdigest()


def jit(function: Callable[..., Any]) -> Any:  # noqa: ANN401
    """Compiles a function that lets go of the GIL; kept on disk for later processes.

    numba looks at a function's own file to see whether its kept code is stale, not at the files of
    what it calls; so the name under which it is kept tells the sources of all kernels. Where it
    cannot be kept, neither beside the sources nor in the user's cache, each process compiles it.
    """
    function.__qualname__ += f"_{_SOURCES}"
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return njit(nogil=True, error_model="numpy")(function)


# Contexts, by the part of a row.
TAIL = 0
COUNT = 1  # + tail bucket (8)
GAP = 9  # + octave of the id before (21) x octave of the ids left (9)
VALUE = GAP + 21 * 9  # + bucket of the mean value left (64) x ids left (3)
CONTEXTS = VALUE + 64 * 3
# Gaps and values are coded by a state of their own each, so a decoder works on both at once.
STATE_OF = np.array([0 if GAP <= c < VALUE else 1 for c in range(CONTEXTS)], np.uint8)

TAIL_LEVELS = 126  # the root of the tail mass in so many steps; 0 is no tail at all
TAIL_BUCKETS = 8
CENTROIDS = 16  # levels below have centroids by tail bucket
UNIT = 64  # fixed-point units of one squared step, or of one draw


def _gap_classes() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lowest number and plain bits of each gap class: 8 single ones, then 4 per octave."""
    low = [*range(8), *((4 + m) << (e - 2) for e in range(3, 20) for m in range(4))]
    bits = [0] * 8 + [e - 2 for e in range(3, 20) for _ in range(4)]
    return np.array(low), np.array(bits)


def _value_classes() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same for values and counts: 16 single ones, then 8 per octave."""
    low = [*range(16), *((8 + m) << (e - 3) for e in range(4, 16) for m in range(8))]
    bits = [0] * 16 + [e - 3 for e in range(4, 16) for _ in range(8)]
    return np.array(low), np.array(bits)


GAP_LOW, GAP_BITS = _gap_classes()
VALUE_LOW, VALUE_BITS = _value_classes()
OCTAVES = np.array([min(int(n).bit_length(), 8) for n in range(4097)], np.int64)
# float32: the mean of a rest is a multiplication, rounded alike on every machine.
SHARES = np.array([0.0, *(1.0 / n for n in range(1, 4097))], np.float32)
_BUCKET_BITS = np.uint32(21)  # the exponent and two leading bits of a float32: quarter octaves
_FIRST_BUCKET = (127 + 1) << 2  # means below 2 units are one bucket


def inline(function: Callable[..., Any]) -> Any:  # noqa: ANN401
    """Makes a function a part of each kernel that calls it."""
    return njit(inline="always", error_model="numpy")(function)


@jit
def octave(value: int) -> int:
    """Bits of a number below 2^32."""
    bits = 0
    for shift in (16, 8, 4, 2, 1):
        if value >> shift:
            value >>= shift
            bits += shift
    return bits + (1 if value else 0)


@jit
def gap_class(gap: int) -> int:
    """The class of a gap below 2^20."""
    if gap < 8:
        return gap
    top = octave(gap) - 1
    return 8 + 4 * (top - 3) + ((gap >> (top - 2)) & 3)


@jit
def value_class(value: int) -> int:
    """The class of a value below 2^16."""
    if value < 16:
        return value
    top = octave(value) - 1
    return 16 + 8 * (top - 4) + ((value >> (top - 3)) & 7)


@jit
def gap_context(octave_before: int, left: int) -> Any:  # noqa: ANN401
    """The context of a gap after an id whose number + 1 has `octave_before` bits."""
    return GAP + octave_before * 9 + OCTAVES[left]


@jit
def value_context(rest: Any, left: Any) -> Any:  # noqa: ANN401
    """The context of a value when `rest` units are to be shared by `left` ids."""
    return VALUE + np.int64(value_bucket(rest, np.uint64(left))) * 3 + min(left, 3) - 1


@inline
def value_bucket(rest: Any, left: Any) -> Any:  # noqa: ANN401
    """The bucket of the mean of `rest` units over `left` values: quarter octaves from 2 units."""
    mean = np.float32(np.float32(max(rest, 2)) * SHARES[left])
    bucket = np.int64(mean.view(np.uint32) >> _BUCKET_BITS) - _FIRST_BUCKET
    return np.uint64(min(max(bucket, np.int64(0)), np.int64(63)))


@jit
def tail_level(mass: float) -> Any:  # noqa: ANN401
    """The symbol of a tail of this mass in [0, 1]; 0 is left for no tail at all."""
    return 1 + int(np.rint(np.sqrt(min(max(mass, 0.0), 1.0)) * (TAIL_LEVELS - 1)))


@jit
def tail_mass(level: int) -> float:
    """The mass of a tail symbol above 0; the lowest stands for small masses, not for none."""
    root = (level - 1) / (TAIL_LEVELS - 1) if level > 1 else 0.5 / (TAIL_LEVELS - 1)
    return root * root


@jit
def tail_bucket(level: int) -> int:
    """The bucket of a tail symbol."""
    return level * TAIL_BUCKETS // (TAIL_LEVELS + 1)


@jit
def tail_buckets(masses: NDArray[np.float64]) -> Any:  # noqa: ANN401
    """The buckets of tails of these masses: int64, as long."""
    buckets = np.empty(len(masses), np.int64)
    for row in range(len(masses)):
        buckets[row] = tail_bucket(tail_level(masses[row]))
    return buckets
