"""A linear layer whose weight is kept as packed codes with one scale and zero point per group.

The weight is `w = (q - z) * s` (the convention of HQQ, mobiusml.github.io/hqq_blog), with groups
along the input dimension that never cross rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.pack import pack, packed_width, unpack


class QuantLinear(nn.Module):
    """`y = x W^T + b` with W stored as codes of `bits` bits.

    codes: uint8 `[out, in * bits / 8]`; scale, zero: float16 `[out, in / group_size]`;
    bias: `[out]` or None. Raises ValueError when the widths do not fit each other.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    dense: Tensor | None
    kernel = "dequantize+matmul"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if group_size < 1 or in_features % group_size:
            raise ValueError(
                f"a group of {group_size} weights does not divide an input width of {in_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        width, groups = packed_width(in_features, bits), in_features // group_size
        for name, columns, kind in (
            ("codes", width, torch.uint8),
            ("scale", groups, torch.float16),
            ("zero", groups, torch.float16),
        ):
            empty = torch.zeros(out_features, columns, dtype=kind, device=device)
            self.register_buffer(name, empty)
        self.register_buffer("dense", None, persistent=False)
        self.bias: nn.Parameter | None = None
        if bias:
            zeros = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, bias: Tensor | None = None
    ) -> QuantLinear:
        """A layer of unpacked uint8 codes `[out, in]`, scale and zero `[out, in / group_size]`."""
        rows, columns = codes.shape
        if scale.shape != zero.shape or scale.dim() != 2 or scale.shape[0] != rows:
            raise ValueError(
                f"scale {list(scale.shape)} and zero {list(zero.shape)} must both be "
                f"[{rows}, groups]"
            )
        groups = scale.shape[1]
        if not groups or columns % groups:
            raise ValueError(f"{groups} groups do not divide an input width of {columns}")
        layer = cls(columns, rows, bits, columns // groups, device=codes.device)
        layer.codes.copy_(pack(codes, bits))
        layer.scale.copy_(scale)
        layer.zero.copy_(zero)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]`; computed in float32 (or wider) and rounded once to `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        codes = unpack(self.codes, self.bits).unflatten(1, (-1, self.group_size))
        weight = codes.to(wide).sub_(self.zero.unsqueeze(-1)).mul_(self.scale.unsqueeze(-1))
        return weight.flatten(1).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., in]` in any float dtype; returns `[..., out]` in the same."""
        dense = self.dense
        weight = dense if dense is not None and dense.dtype == x.dtype else self.dequantize(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def keep_dense(self, dtype: torch.dtype) -> None:
        """Keep the dequantized weight for inputs of `dtype`: same results, faster, more memory.

        It is no part of the state_dict. `drop_dense` frees it.
        """
        self.dense = self.dequantize(dtype)

    def drop_dense(self) -> None:
        """Free the weight that `keep_dense` kept."""
        self.dense = None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}, kernel={self.kernel}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Moves to another device as usual, but `.to(dtype)` leaves scale and zero in float16:
        they are part of the stored format, and rounding them to bfloat16 would change the weight.
        """
        exact = {name: getattr(self, name) for name in ("scale", "zero")}
        dense_dtype = None if self.dense is None else self.dense.dtype
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        if self.dense is not None and self.dense.dtype != dense_dtype:
            self.drop_dense()  # converted, it would no longer equal a fresh dequantization
        return self


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """All QuantLinear layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


@contextmanager
def dense_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block every QuantLinear of `model` keeps its dense weight in `dtype`."""
    layers = quant_linears(model).values()
    try:
        for layer in layers:
            layer.keep_dense(dtype)
        yield
    finally:
        for layer in layers:
            layer.drop_dense()
