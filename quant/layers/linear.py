"""Linear layers on packed codes (see `quant.layers.weight`), and the kernels that they run.

`quant.kernels.use_kernels` gives a layer a faster layout of its codes; files, pickles and copies
always hold them as stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.codes import Codes, row_chunks
from quant.kernels import Preference, choose
from quant.kernels.int8_dynamic import quantize_tokens
from quant.kernels.kernel import Kernel, StoredWeight
from quant.layers.weight import QuantEmbedding, QuantWeight

__all__ = [
    "QuantEmbedding",
    "QuantLinear",
    "QuantWeight",
    "dense_weights",
    "quant_linears",
    "quant_weights",
]


class QuantLinear(QuantWeight):
    """`y = x W^T + b` with W `[out_features, in_features]` in codes; bias `[out]` or None.

    activations="int8": each token of x is quantized to int8 (symmetric, largest magnitude = 127)
    before the product; for codes of one scale per row.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        activations: Literal["int8"] | None = None,
    ) -> None:
        super().__init__(out_features, in_features, bits, group_size, device)
        if activations not in (None, "int8"):
            raise ValueError(f"activations {activations!r} are unknown; may be 'int8' or None")
        if activations and group_size != in_features:
            raise ValueError(
                f"activations in int8 go with one scale per row, not with groups of {group_size}; "
                f"may be {in_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.activations = activations
        # None of these is a buffer: they are made of the stored tensors, and looked up quickly.
        self.prefer: Preference = "plain"
        self.dense: Tensor | None = None
        self._kernel: Kernel | None = None
        self._active: Kernel | None = None  # the kernel, except while a dense weight is kept
        self._reason = ""
        self._shared: tuple[QuantEmbedding, ...] = ()
        self.register_parameter("bias", None)
        if bias:
            zeros = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def from_codes(
        cls,
        weight: Codes,
        bias: Tensor | None = None,
        activations: Literal["int8"] | None = None,
    ) -> QuantLinear:
        """A layer of these codes."""
        rows, columns = weight.codes.shape
        layer = cls(
            columns,
            rows,
            weight.bits,
            weight.group_size,
            device=weight.codes.device,
            activations=activations,
        )
        layer.set_codes(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @classmethod
    def share(
        cls, embedding: QuantEmbedding, activations: Literal["int8"] | None = None
    ) -> QuantLinear:
        """A head tied to an embedding: it works on the embedding's codes and has none itself."""
        head = cls(
            embedding.columns,
            embedding.rows,
            embedding.bits,
            embedding.group_size,
            device="meta",
            activations=activations,
        )
        for name in ("codes", "scale", "zero"):
            head._buffers[name] = None
        head._shared = (embedding,)
        embedding.heads.add(head)
        return head

    @property
    def shared(self) -> QuantEmbedding | None:
        """The embedding whose codes this head works on, or None."""
        return self._shared[0] if self._shared else None

    @property
    def kernel(self) -> str:
        """What runs: the kernel's name, or plain (dequantize + matmul) and why."""
        if self._kernel is not None:
            return self._kernel.name
        return f"plain: {self._reason}" if self._reason else "plain"

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., in]` in any float dtype; returns `[..., out]` in the same."""
        kernel = self._active
        if kernel is None or x.requires_grad:  # kernels have no gradients
            return self._plain(x)
        y = kernel(x)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def _plain(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.dense
        if weight is None or weight.dtype != self._product_dtype(x.dtype):
            if x.requires_grad or torch.compiler.is_compiling() or self.activations:
                weight = self._factor(x.dtype)
            else:
                return self._in_chunks(x, bias)
        if not self.activations:
            return F.linear(x, weight, bias)
        rows = x.reshape(-1, self.columns)
        codes, token_scale = quantize_tokens(rows.detach())
        if x.requires_grad:  # rounding has no gradient: straight through, as if it were not there
            exact = rows / token_scale
            codes = exact + (codes - exact).detach()
        total = F.linear(codes.to(weight.dtype), weight) * token_scale
        scale = (self.shared or self).scale  # not stored(), which may have to pack the codes
        y = (total * scale.t()).to(x.dtype).view(*x.shape[:-1], self.rows)
        return y if bias is None else y + bias

    def _factor(self, dtype: torch.dtype) -> Tensor:
        """What the input is multiplied by: the weight, or `q - z` where the scales come after."""
        if not self.activations:
            return self.dequantize(dtype)
        weight = self.unpacked()
        one = torch.ones_like(weight.scale)
        whole = Codes(weight.codes, one, weight.zero, self.bits)
        return whole.dequantize(self._product_dtype(dtype))

    def _product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Sums of products of whole numbers overflow float16."""
        return torch.float32 if self.activations and dtype is torch.float16 else dtype

    def _in_chunks(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with as many rows of the weight at a time as a cache holds in float32."""
        rows = x.reshape(-1, self.columns)
        y = rows.new_empty(len(rows), self.rows)
        weight = self._weight()
        for part in row_chunks(self.rows, self.columns, x.device):
            piece = None if bias is None else bias[part]
            y[:, part] = F.linear(rows, weight.unpacked(part).dequantize(x.dtype), piece)
        return y.view(*x.shape[:-1], self.rows)

    def use_kernel(self, prefer: Preference) -> None:
        """Hold the weight in the layout of the kernel that `prefer` asks for, if one fits."""
        if self._kernel is None or prefer != self.prefer:
            self._let_go()
            self.prefer = prefer
            self._renew()

    def _let_go(self) -> None:
        """Back to the stored codes, without a kernel."""
        if self._kernel is not None and not self._shared:
            self._buffers["codes"] = self._kernel.codes()
        self._kernel = self._active = self.dense = None
        self._reason = ""

    def _renew(self) -> None:
        """Choose the kernel again for what is stored now, where it is now."""
        self._kernel = self._active = self.dense = None
        with torch.no_grad():
            kernel, self._reason = choose(self._weight(), self.prefer)
        self._kernel = self._active = kernel
        if kernel is not None and not self._shared:
            self._buffers["codes"] = None

    def _weight(self) -> StoredWeight:
        held = self.stored()
        return StoredWeight(
            held["codes"],
            held["scale"],
            held["zero"],
            self.bits,
            self.columns,
            self.activations,
            bool(self._shared),
        )

    def stored(self) -> dict[str, Tensor]:
        """codes, scale and zero as a file holds them; a tied head gives the embedding's own."""
        if self._shared:
            return self._shared[0].stored()
        if self._kernel is None:
            return super().stored()
        return {"codes": self._kernel.codes(), "scale": self.scale, "zero": self.zero}

    def unpacked(self) -> Codes:
        """The weight as unpacked codes."""
        return super().unpacked() if self._kernel is None else self._kernel.unpacked()

    @torch.no_grad()
    def keep_dense(self, dtype: torch.dtype) -> None:
        """Keep the dequantized weight for inputs of `dtype`: the plain path's results, faster for
        many rows, more memory. It is no part of the state_dict. `drop_dense` frees it.

        With int8 activations `q - z` is kept, and the input is quantized as ever.
        """
        self.dense = self._factor(dtype)
        self._active = None

    def drop_dense(self) -> None:
        """Free the weight that `keep_dense` kept."""
        self.dense = None
        self._active = self._kernel

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}, kernel={self.kernel}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **named: Any
    ) -> None:
        if self._shared:  # the embedding loads them, under its own name
            own = {prefix + name for name in ("codes", "scale", "zero")}
            state_dict = {key: value for key, value in state_dict.items() if key not in own}
            nn.Module._load_from_state_dict(self, state_dict, prefix, *arguments, **named)
            return
        super()._load_from_state_dict(state_dict, prefix, *arguments, **named)

    def __getstate__(self) -> dict[str, Any]:
        """As stored: a kernel's layout is of one processor, and another may unpickle."""
        state = {**self.__dict__, "_kernel": None, "_active": None, "dense": None}
        if not self._shared:
            state["_buffers"] = {**self._buffers, **self.stored()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._shared:
            self._shared[0].heads.add(self)
        self._renew()


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """All QuantLinear layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def quant_weights(model: nn.Module) -> dict[str, QuantWeight]:
    """All quantized layers of a model by name, embeddings included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantWeight)}


@contextmanager
def dense_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block every QuantLinear of `model` keeps its dense weight in `dtype`.

    They give the plain path's results, whatever the layer's kernel.
    """
    layers = quant_linears(model).values()
    try:
        for layer in layers:
            layer.keep_dense(dtype)
        yield
    finally:
        for layer in layers:
            layer.drop_dense()
