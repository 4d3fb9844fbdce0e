"""Tight bit packing of integer codes: 8 codes of b bits fill exactly b bytes, for every b in 1..8.

Code i of a block of 8 takes the bits [i*b, (i+1)*b) of the block's b bytes, least significant
first (a little-endian bit stream). A block is held in one 64-bit word while its codes are spread
to one per byte, or drawn together, in three steps of halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 8  # codes per block: the smallest count that fills whole bytes for every width
HALVES = (32, 16, 8)  # width in bits of the fields of a word after each step of spreading
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # of a block's bytes


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take. Raises ValueError as `pack` does."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be packed; bits may be 1 to 8")
    if count % BLOCK:
        raise ValueError(f"{count} codes per row cannot be packed; must be a multiple of {BLOCK}")
    return count * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `[..., n]`, each below 2**bits, into uint8 `[..., n * bits / 8]`.

    Raises ValueError when bits is not 1..8, n is no multiple of 8, or a code is too large.
    """
    width = packed_width(codes.shape[-1], bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype}; must be torch.uint8")
    if bits == 8:
        return codes.clone(memory_format=torch.contiguous_format)
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    words = codes.contiguous().view(-1, BLOCK).view(torch.int64)
    for half in reversed(HALVES):
        used = bits * half // 8
        low = _fields(used, 2 * half)
        words = (words & low) | (words >> (half - used) & low << used)
    if bits in WORDS:  # the low bytes of each word, all at once
        packed = words.to(WORDS[bits]).view(torch.uint8)
    else:
        packed = words.view(torch.uint8)[:, :bits]
    return packed.reshape(*codes.shape[:-1], width)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: uint8 `[..., m]` to uint8 codes `[..., m * 8 / bits]`.

    Raises ValueError when bits is not 1..8 or m is no multiple of bits.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be unpacked; bits may be 1 to 8")
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes are {packed.dtype}; must be torch.uint8")
    if packed.shape[-1] % bits:
        raise ValueError(f"rows of {packed.shape[-1]} bytes do not hold codes of {bits} bits")
    if bits == 8:
        return packed.clone(memory_format=torch.contiguous_format)
    blocks = packed.reshape(-1, bits)
    aligned = torch.compiler.is_compiling() or not blocks.storage_offset() % bits
    if bits in WORDS and aligned:
        words = blocks.view(WORDS[bits]).to(torch.int64)
    else:
        words = torch.zeros(len(blocks), 1, dtype=torch.int64, device=packed.device)
        room = words.view(torch.uint8)
        for byte in range(bits):
            room[:, byte] = blocks[:, byte]
    for half in HALVES:
        used = bits * half // 8
        low = _fields(used, 2 * half)
        words = (words & low) | (words << (half - used) & low << half)
    return words.view(torch.uint8).view(*packed.shape[:-1], packed.shape[-1] * BLOCK // bits)


def _fields(used: int, width: int) -> int:
    """The mask of the lowest `used` bits of each field of `width` bits in a word."""
    return sum(((1 << used) - 1) << at for at in range(0, 64, width))
