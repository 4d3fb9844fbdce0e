"""Ids drawn from the teacher's softmax, the same ones whenever and wherever they are drawn.

The random numbers are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): a function of the cache's seed, the sequence key, the position, the number of the draw and
the redraw, so that no order of work, batch or rank changes them. An id is found by inverting the
distribution function in float64 over the whole vocabulary, in two levels.
"""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

# Ids whose probabilities are summed up to one entry of the upper level.
BLOCK = 32
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BELOW_ONE = 1.0 - 2.0**-53


def stream(seed: int, key: bytes, redraw: int) -> list[int]:
    """Four 32-bit words that tell the random numbers of one sequence and redraw from all others."""
    text = struct.pack("<QI", seed, redraw) + key
    return list(struct.unpack("<4I", hashlib.blake2b(text, digest_size=16).digest()))


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10: four words of counter and two of key to four random words.

    All are int64 tensors that broadcast, of values below 2^32; so are the results. Products wrap
    in int64, which keeps their bits.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(_ROUNDS):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = ((right >> 32) & _WORD) ^ b ^ first
        c = ((left >> 32) & _WORD) ^ d ^ second
        b, d = right & _WORD, left & _WORD
        first, second = (first + _WEYL[0]) & _WORD, (second + _WEYL[1]) & _WORD
    return [a, b, c, d]


def uniforms(streams: Tensor, positions: Tensor, draws: int) -> Tensor:
    """Random numbers in [0, 1), float64 [rows, draws], of 53 bits.

    streams: int64 [rows, 4], the `stream` of each row's sequence. positions: int64 [rows], the
    row's place in its sequence.
    """
    pairs = torch.arange(-(-draws // 2), device=streams.device).unsqueeze(0)
    words = [streams[:, i : i + 1] for i in range(4)]
    a, b, c, d = philox([positions.unsqueeze(1), pairs, words[2], words[3]], words[:2])
    halves = [((high << 21) | (low >> 11)).double() for high, low in ((a, b), (c, d))]
    both = torch.stack(halves, dim=-1).reshape(len(streams), -1)
    return both[:, :draws].mul_(2.0**-53)


def draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Ids drawn with replacement: int32 [rows, draws], ascending within a row, repeats included.

    probabilities: float32 [rows, width], not negative, not all 0 in a row, width a multiple of
    `BLOCK`; they need not sum to 1. numbers: float64 [rows, draws] in [0, 1), one for each draw.
    Ids of probability 0 are never drawn. A row of NaN gives ids of no meaning.
    """
    rows, width = probabilities.shape
    draws = numbers.shape[1]
    blocks = probabilities.view(rows, width // BLOCK, BLOCK)
    upper = blocks.sum(dim=-1, dtype=torch.float64).cumsum_(dim=-1)
    wanted = numbers.sort(dim=-1).values * upper[:, -1:]  # a number below 1: below the total
    # Where all is NaN there is no such block; what is drawn then is of no use, but no accident.
    block = torch.searchsorted(upper, wanted, right=True).clamp_(max=upper.shape[1] - 1)
    before = torch.where(block > 0, upper.gather(1, (block - 1).clamp_min_(0)), 0.0)
    lower = blocks.gather(1, block.unsqueeze(-1).expand(rows, draws, BLOCK)).double()
    lower.cumsum_(dim=-1)
    # Rounding must not reach the block's sum, where only ids of probability 0 would be left.
    rest = torch.minimum(wanted - before, lower[..., -1] * _BELOW_ONE)
    inside = (lower <= rest.unsqueeze(-1)).sum(dim=-1)
    return (block * BLOCK + inside).int()
