"""Tight bit packing of integer codes: 8 codes of b bits fill exactly b bytes, for every b in 1..8.

Code i of a block of 8 takes the bits [i*b, (i+1)*b) of the block's b bytes, least significant
first (a little-endian bit stream). Shifts stay in uint8, so unpacking needs no wide temporaries.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 8  # codes per block: the smallest count that fills whole bytes for every width


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
    if bits < 8 and codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    blocks = codes.unflatten(-1, (-1, BLOCK))
    packed = torch.zeros(*blocks.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for index in range(BLOCK):
        byte, shift = divmod(index * bits, 8)
        packed[..., byte] |= blocks[..., index] << shift
        if shift + bits > 8:  # the code straddles two bytes
            packed[..., byte + 1] |= blocks[..., index] >> (8 - shift)
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
    blocks = packed.unflatten(-1, (-1, bits))
    codes = torch.empty(*blocks.shape[:-1], BLOCK, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for index in range(BLOCK):
        byte, shift = divmod(index * bits, 8)
        code = blocks[..., byte] >> shift
        if shift + bits > 8:
            code |= blocks[..., byte + 1] << (8 - shift)  # uint8 drops the bits above
        codes[..., index] = code & mask
    return codes.flatten(-2)
