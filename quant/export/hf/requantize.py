"""Weights moved onto the grids that compressed-tensors has: several ways, to be chosen on KL.

hqq's zero points are fractions; the grids that vLLM runs have none (symmetric) or integers. A scale
is searched per group for the least squared error, which is a way to make a candidate and never a
reason to choose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from quant.codes import Codes
from quant.export.hf.compressed_tensors import Packed, Scheme

CELLS = 1 << 22  # weights worked on at a time: a few float32 temporaries of 16 MB
SHRINK = torch.linspace(1.0, 0.62, 20).tolist()  # of the range that holds every weight
Grid = tuple[Tensor, Tensor]  # scale and zero, each [rows, groups]


def absmax(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Packed:
    """Symmetric, the scale from the largest weight of a group; weight float `[out, in]`.

    The grid reaches from -2**(b-1) to 2**(b-1) - 1 steps: half a step is clipped on one side.
    """
    return _pack(weight, None, scheme, dtype, lambda part, codes: [_symmetric(part, scheme, 1.0)])


def searched(
    weight: Tensor,
    codes: Codes | None,
    scheme: Scheme,
    dtype: torch.dtype,
    importance: Tensor | None = None,
) -> Packed:
    """The scale (and integer zero point) of least squared error among some tens per group.

    weight: float `[out, in]`; codes: the codes it comes from, None if from the original weight:
    their own steps and whole fractions of them are tried too, so codes that fit are held exactly.
    importance: float `[in]`, what a squared error of each column weighs (its mean squared input).
    """

    def grids(part: Tensor, own: Codes | None) -> Iterator[Grid]:
        if own is not None:
            yield from _of_codes(own, scheme, part)
        make = _symmetric if scheme.kind == "symmetric" else _asymmetric
        for shrink in SHRINK:
            yield make(part, scheme, shrink)

    return _pack(weight, codes, scheme, dtype, grids, importance)


def rounded_zeros(weight: Tensor, codes: Codes, scheme: Scheme, dtype: torch.dtype) -> Packed:
    """Asymmetric: the codes themselves (times a whole number if narrower), zero points rounded."""

    def grids(part: Tensor, own: Codes | None) -> Iterable[Grid]:
        assert own is not None
        return list(_of_codes(own, scheme, part))[:1]

    return _pack(weight, codes, scheme, dtype, grids)


def same_codes(codes: Codes, scheme: Scheme, dtype: torch.dtype) -> Packed:
    """The codes as they are: kinds "exact" and "dynamic"; scale and zero rounded to `dtype`.

    Raises ValueError when a "dynamic" scheme is asked for codes with another zero point than 128.
    """
    middle = 1 << (codes.bits - 1)
    signed = (codes.codes.to(torch.int16) - middle).to(torch.int8)
    if scheme.kind == "dynamic":
        if codes.bits != 8 or bool((codes.zero != middle).any()):
            raise ValueError("codes with a zero point cannot be stored as int8-dynamic")
        return Packed(scheme, signed, codes.scale.to(dtype))
    zero = (codes.zero.float() - middle).to(dtype)
    return Packed(scheme, signed, codes.scale.to(dtype), zero)


def _pack(
    weight: Tensor,
    codes: Codes | None,
    scheme: Scheme,
    dtype: torch.dtype,
    grids: Callable[[Tensor, Codes | None], Iterable[Grid]],
    importance: Tensor | None = None,
) -> Packed:
    """Per group the grid with the least error, rows in chunks; scales are rounded before."""
    rows, columns = weight.shape
    size = scheme.group_size or columns
    lowest, highest = -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1
    out_codes = torch.empty(rows, columns, dtype=torch.int8)
    out_scale = torch.empty(rows, columns // size, dtype=dtype)
    out_zero = torch.zeros(rows, columns // size, dtype=torch.int8)
    weighs = None if importance is None else importance.float().view(-1, size)
    step = max(1, CELLS // columns)
    for first in range(0, rows, step):
        chunk = slice(first, first + step)
        part = weight[chunk].float().unflatten(1, (-1, size))
        own = None if codes is None else _rows(codes, chunk, size)
        best = torch.full(part.shape[:2], torch.inf)
        for scale, zero in grids(part, own):
            scale = scale.to(dtype).float()
            scale = torch.where(scale == 0, torch.ones_like(scale), scale).unsqueeze(-1)
            zero = zero.unsqueeze(-1)
            made = (part / scale + zero).round_().clamp_(lowest, highest)
            error = ((made - zero) * scale).sub_(part).square_()
            total = (error if weighs is None else error.mul_(weighs)).sum(-1)
            better = total < best
            best = torch.where(better, total, best)
            out_scale[chunk][better] = scale.squeeze(-1)[better].to(dtype)
            out_zero[chunk][better] = zero.squeeze(-1)[better].to(torch.int8)
            out_codes[chunk].view(made.shape)[better] = made[better].to(torch.int8)
    return Packed(scheme, out_codes, out_scale, out_zero if scheme.kind == "asymmetric" else None)


def _rows(codes: Codes, chunk: slice, size: int) -> Codes:
    """Some rows, their groups cut to `size` weights."""
    repeat = codes.group_size // size
    scale, zero = codes.scale[chunk].float(), codes.zero[chunk].float()
    if repeat > 1:
        scale, zero = scale.repeat_interleave(repeat, 1), zero.repeat_interleave(repeat, 1)
    return Codes(codes.codes[chunk], scale, zero, codes.bits)


def _symmetric(part: Tensor, scheme: Scheme, shrink: float) -> Grid:
    scale = part.abs().amax(-1) * (shrink / ((1 << (scheme.bits - 1)) - 0.5))
    return scale, torch.zeros_like(scale)


def _asymmetric(part: Tensor, scheme: Scheme, shrink: float) -> Grid:
    low, high = part.amin(-1).clamp(max=0) * shrink, part.amax(-1).clamp(min=0) * shrink
    scale = (high - low) / ((1 << scheme.bits) - 1)
    floor = -(1 << (scheme.bits - 1))
    zero = torch.where(scale == 0, torch.zeros_like(low), floor - low / scale)
    return scale, _whole(zero, scheme)


def _of_codes(codes: Codes, scheme: Scheme, part: Tensor) -> Iterator[Grid]:
    """The steps of the codes and whole fractions of them, the finest first."""
    if codes.group_size != part.shape[-1]:
        return  # the groups are finer than those of a row: handled by the search alone
    finest = ((1 << scheme.bits) - 1) // ((1 << codes.bits) - 1)
    floor = -(1 << (scheme.bits - 1))
    for times in range(max(finest, 1), 0, -1):
        scale = codes.scale / times
        if scheme.kind == "asymmetric":
            yield scale, _whole(codes.zero * times + floor, scheme)
        else:
            yield scale, torch.zeros_like(scale)


def _whole(zero: Tensor, scheme: Scheme) -> Tensor:
    return zero.round().clamp(-(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1)
