"""Weights kept as packed codes with one scale and zero point per group, and lookups in them.

The weight is `w = (q - z) * s` (the convention of HQQ, mobiusml.github.io/hqq_blog), with groups
along the input dimension that never cross rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from quant.codes import Codes, pack_into, packed_width, unpack


class QuantWeight(nn.Module):
    """A weight `[rows, columns]` stored as codes of `bits` bits.

    codes: uint8 `[rows, columns * bits / 8]`; scale, zero: float16 `[rows, columns / group_size]`.
    Raises ValueError when the widths do not fit each other.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    method: str = ""  # what the codes were made by, where that is known

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
        self._let_go()
        pack_into(self.codes, weight.codes, weight.bits)
        self.scale.copy_(weight.scale)
        self.zero.copy_(weight.zero)
        self._renew()

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

    def cast_stored(self, dtype: torch.dtype) -> None:
        """What `trainer.models.load.cast_stored` does to this layer: nothing, codes stay."""

    def _let_go(self) -> None:
        """Drop what was made of the stored tensors, which are about to change."""

    def _renew(self) -> None:
        """The stored tensors have changed."""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.stored().items():
            destination[prefix + name] = tensor
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        self._let_go()
        super()._load_from_state_dict(*arguments, **named)
        self._renew()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantWeight:
        """Moves to another device as usual, but `.to(dtype)` leaves scale and zero in float16:
        they are part of the stored format, and rounding them to bfloat16 would change the weight.
        """
        if self._buffers["scale"] is None:  # another layer's
            super()._apply(fn, recurse)
            return self
        device = self.scale.device
        moves = fn(torch.empty(0, device=device)).device != device
        if moves:
            self._let_go()
        exact = {name: self._buffers[name] for name in ("scale", "zero")}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            moved = self._buffers[name]
            assert tensor is not None and moved is not None
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        if moves:
            self._renew()
        return self


class QuantEmbedding(QuantWeight):
    """A lookup table stored as codes: `[...]` ids to `[..., columns]` in `dtype`.

    The codes stay as they are stored (possibly a mapped file): a lookup reads its rows alone.
    """

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
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.dtype = dtype
        self.heads: WeakSet[QuantWeight] = WeakSet()  # that work on these codes

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

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, bits={self.bits}, group_size={self.group_size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantWeight:
        """As every layer's, and `.to(dtype)` changes what a lookup returns."""
        kind = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        if kind.is_floating_point:
            self.dtype = kind
        return super()._apply(fn, recurse)

    def cast_stored(self, dtype: torch.dtype) -> None:
        """`dtype` is what a lookup gives from now on."""
        self.dtype = dtype

    def _renew(self) -> None:
        for head in self.heads:
            head._renew()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["heads"]  # each head enters itself again
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "heads": WeakSet()})
