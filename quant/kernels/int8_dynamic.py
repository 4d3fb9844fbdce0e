"""Weights and activations in int8: the product of whole numbers, then the scales.

Each token's values are divided by its largest magnitude / 127 and rounded ("dynamic" quantization:
the scale is found at run time, per token). The products are summed exactly: by `torch._int_mm`
in int32, or in float32 where that is wrong, as oneDNN's is with AVX2 instructions alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.codes import Codes, row_chunks
from quant.kernels.kernel import Kernel, Refused, StoredWeight

CUDA_ROWS = 32  # torch._int_mm wants more than 16 rows on a GPU
EXACT_COLUMNS = 1024  # sums of so many products of int8 are whole numbers that float32 has


class Int8Dynamic(Kernel):
    """`q - z` of every weight as one int8, with one scale per row."""

    name = "int8 x int8"

    def __init__(self, weight: StoredWeight) -> None:
        super().__init__(weight)
        if weight.groups != 1:
            raise Refused(f"groups of {weight.group_size} do not fit the int8 kernel")
        if not torch.equal(self.zero, self.zero.round()):
            raise Refused("zero points that are not whole do not fit the int8 kernel")
        if weight.scale.is_cuda and (self.columns % 8 or self.rows % 8):
            raise Refused("a GPU's int8 kernel wants widths that are multiples of 8")
        held = torch.empty(self.rows, self.columns, dtype=torch.int8, device=weight.codes.device)
        for part in row_chunks(self.rows, self.columns, held.device):
            # float16 zero points go further than int16.
            whole = weight.unpacked(part).codes.to(torch.int32) - self.zero[part].to(torch.int32)
            if int(whole.min()) < -128 or int(whole.max()) > 127:
                raise Refused("codes further than 8 bits from their zero point do not fit int8")
            held[part] = whole
        self.transposed = held.t()  # [columns, rows], a view
        self.row_scale = self.scale.float().t().contiguous()
        self.in_float32 = not held.is_cuda and saturates()
        if self.in_float32:
            self.name = f"{self.name} in float32"

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.columns)
        codes, scale = quantize_tokens(rows)
        if self.in_float32:
            total = _exact_product(codes, self.transposed)
        elif x.is_cuda and len(codes) < CUDA_ROWS:
            more = F.pad(codes, (0, 0, 0, CUDA_ROWS - len(codes))).to(torch.int8)
            total = torch._int_mm(more, self.transposed)[: len(codes)]
        else:
            total = torch._int_mm(codes.to(torch.int8), self.transposed)
        return (total * scale).mul_(self.row_scale).to(x.dtype).view(*x.shape[:-1], self.rows)

    def unpacked(self) -> Codes:
        held = self.transposed.t()
        codes = torch.empty_like(held, dtype=torch.uint8)
        for part in row_chunks(self.rows, self.columns, codes.device):
            codes[part] = held[part].to(torch.int16) + self.zero[part].to(torch.int16)
        return Codes(codes, self.scale, self.zero, self.bits)


@cache
def saturates() -> bool:
    """Whether the CPU's product of int8 is wrong, where pairs of products are summed in 16 bits."""
    most = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, most.t()) != 64 * 127 * 127).any())


def _exact_product(codes: Tensor, transposed: Tensor) -> Tensor:
    """codes `[tokens, columns]`, whole numbers, times int8 `[columns, rows]`; int32."""
    parts = zip(codes.float().split(EXACT_COLUMNS, 1), transposed.split(EXACT_COLUMNS), strict=True)
    total = codes.new_zeros(len(codes), transposed.shape[1], dtype=torch.int32)
    for some, columns in parts:
        total += (some @ columns.float()).to(torch.int32)
    return total


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[tokens, width]` as whole numbers -127..127 in float32 (or wider), and the scales.

    The scales are `[tokens, 1]`; a token of zeros has one too, so that nothing is divided by 0.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    largest = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True, dtype=wide)
    scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale).round_(), scale
