"""Layers whose weight is kept as packed codes with one scale and zero point per group.

The weight is `w = (q - z) * s` (the convention of HQQ, mobiusml.github.io/hqq_blog), with groups
along the input dimension that never cross rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.codes import Codes
from quant.pack import pack, packed_width, unpack


class QuantWeight(nn.Module):
    """A weight `[rows, columns]` stored as codes of `bits` bits.

    codes: uint8 `[rows, columns * bits / 8]`; scale, zero: float16 `[rows, columns / group_size]`.
    Raises ValueError when the widths do not fit each other.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        bits: int,
        group_size: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if group_size < 1 or columns % group_size:
            raise ValueError(
                f"a group of {group_size} weights does not divide an input width of {columns}"
            )
        self.rows = rows
        self.columns = columns
        self.bits = bits
        self.group_size = group_size
        width, groups = packed_width(columns, bits), columns // group_size
        for name, size, kind in (
            ("codes", width, torch.uint8),
            ("scale", groups, torch.float16),
            ("zero", groups, torch.float16),
        ):
            empty = torch.zeros(rows, size, dtype=kind, device=device)
            self.register_buffer(name, empty)

    def set_codes(self, weight: Codes) -> None:
        """Take the codes of `weight`, of this layer's shape."""
        self.codes.copy_(pack(weight.codes, weight.bits))
        self.scale.copy_(weight.scale)
        self.zero.copy_(weight.zero)

    def stored(self) -> dict[str, Tensor]:
        """codes, scale and zero as a file holds them, whatever layout the kernel works on."""
        return {"codes": self.codes, "scale": self.scale, "zero": self.zero}

    def unpacked(self) -> Codes:
        """The weight as unpacked codes."""
        held = self.stored()
        return Codes(unpack(held["codes"], self.bits), held["scale"], held["zero"], self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[rows, columns]`; computed in float32 and rounded once to `dtype`."""
        return self.unpacked().dequantize(dtype)


class QuantEmbedding(QuantWeight):
    """A lookup table stored as codes: `[...]` ids to `[..., columns]` in `dtype`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        group_size: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, bits, group_size, device)
        self.dtype = dtype

    @classmethod
    def from_codes(cls, weight: Codes, dtype: torch.dtype = torch.bfloat16) -> QuantEmbedding:
        """A table of these codes."""
        rows, columns = weight.codes.shape
        made = cls(rows, columns, weight.bits, weight.group_size, dtype, device=weight.codes.device)
        made.set_codes(weight)
        return made

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 of any shape; returns `[*ids.shape, columns]` in `dtype`."""
        flat = ids.reshape(-1)
        rows = Codes(
            unpack(self.codes[flat], self.bits), self.scale[flat], self.zero[flat], self.bits
        )
        return rows.dequantize(self.dtype).view(*ids.shape, self.columns)


class QuantLinear(QuantWeight):
    """`y = x W^T + b` with W `[out_features, in_features]` in codes; bias `[out]` or None."""

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
        super().__init__(out_features, in_features, bits, group_size, device)
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("dense", None, persistent=False)
        self.bias: nn.Parameter | None = None
        if bias:
            zeros = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def from_codes(cls, weight: Codes, bias: Tensor | None = None) -> QuantLinear:
        """A layer of these codes."""
        rows, columns = weight.codes.shape
        layer = cls(columns, rows, weight.bits, weight.group_size, device=weight.codes.device)
        layer.set_codes(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

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


def quant_weights(model: nn.Module) -> dict[str, QuantWeight]:
    """All quantized layers of a model by name, embeddings included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantWeight)}


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
