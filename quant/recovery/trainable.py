"""Training of what a quantized model keeps beside its codes: scales, zero points, norms, biases.

    with trainable(model) as parts:
        optimizer = torch.optim.AdamW(parts.parameters())
        for batch in batches:
            with parts.gradients():
                loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            parts.write()

The codes stay as they are. `parts.parameters()` are float32; the model itself holds them rounded
to what is stored (float16 scales and zero points, norms in the model's dtype), in training too. So
what is trained, measured and saved is one model, and after `write` it is an ordinary quantized one.

The weight is `w = (q - z) * s`. A scale is trained as `s = s0 * exp(a)`, from a = 0, because scales
differ in size by orders of magnitude and one learning rate is to fit all of them; it never changes
its sign. A zero point counts in steps of the codes, which is its natural unit. With G = dL/dw,

    dL/da = s * sum over the group of G * (q - z),    dL/dz = -s * sum over the group of G,

and the roundings are passed straight through. A group whose codes are all equal stays as it is: it
says one value only, and its scale is arbitrary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.codes import row_chunks, scaled, unpack
from quant.layers.linear import QuantEmbedding, QuantLinear, QuantWeight, quant_weights

LARGEST = torch.finfo(torch.float16).max


@contextmanager
def trainable(model: nn.Module) -> Iterator[Trainable]:
    """Within the block a quantized model can be trained through the `Trainable` that is given.

    Nothing else of the model is. Outside of `gradients` it is the quantized model as ever, without
    kernels; afterwards with the kernels it had. Raises ValueError (one line) for a model without
    quantized layers, or with activations in int8.
    """
    layers = quant_weights(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no quantized layer; quantize it first")
    for name, layer in layers.items():
        if getattr(layer, "activations", None):
            raise ValueError(
                f"layer {name} rounds its activations to int8, which cannot be trained; may be a "
                "layer of hqq or rtn"
            )
    linears = [layer for layer in layers.values() if isinstance(layer, QuantLinear)]
    preferred = [layer.prefer for layer in linears]
    for layer in linears:
        layer.use_kernel("plain")
    parts = Trainable(model, layers)
    try:
        yield parts
    finally:
        parts.close()
        for layer, prefer in zip(linears, preferred, strict=True):
            layer.use_kernel(prefer)


class Trainable:
    """The trained parts of a model; see the module's docstring. Made by `trainable`."""

    def __init__(self, model: nn.Module, layers: dict[str, QuantWeight]) -> None:
        self._model = model
        self._names = [
            (name, module)
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, QuantWeight)
        ]
        own = [layer for layer in layers.values() if getattr(layer, "shared", None) is None]
        self._groups = {id(layer): _Groups(layer) for layer in own}
        dtype = getattr(model, "dtype", torch.float32)
        self._views = {id(each): self._view(each, dtype) for each in layers.values()}
        # All vectors: weights and biases of norms, biases of layers. Matrices in 16 bits stay.
        self._vectors = [
            _Vector(parameter)
            for parameter in model.parameters()
            if parameter.ndim == 1 and parameter.is_floating_point()
        ]

    def _view(self, layer: QuantWeight, dtype: torch.dtype) -> nn.Module:
        groups = self._groups[id(getattr(layer, "shared", None) or layer)]
        if isinstance(layer, QuantEmbedding):
            return _Table(groups, layer.dtype)
        assert isinstance(layer, QuantLinear)
        return _Linear(groups, layer, dtype)

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer changes, float32: of each quantized weight the logarithm of the scales
        by which they are multiplied and the zero points, [rows, groups] both, then all vectors."""
        of_groups = [each for groups in self._groups.values() for each in groups.parameters()]
        return [*of_groups, *(vector.exact for vector in self._vectors)]

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Within the block the model's forward pass has gradients in `parameters()`.

        The quantized layers are others then, which multiply by the weight as `dequantize` gives
        it; a head has it as `weight`. Of each layer the dense weight is there while it is used.
        """
        for name, layer in self._names:
            self._model.set_submodule(name, self._views[id(layer)])
        for vector in self._vectors:
            vector.stored.requires_grad_(True)
        try:
            yield
        finally:
            for name, layer in self._names:
                self._model.set_submodule(name, layer)
            for vector in self._vectors:
                vector.stored.requires_grad_(False)

    @torch.no_grad()
    def write(self) -> None:
        """Rounds the parameters into the model: after every step of the optimizer."""
        for groups in self._groups.values():
            groups.layer.scale.copy_(groups.scale())
            groups.layer.zero.copy_(groups.zero())
        for vector in self._vectors:
            vector.stored.copy_(vector.exact)

    def stored(self) -> list[Tensor]:
        """Copies of all that `write` writes, for `put_back`."""
        return [tensor.detach().clone() for tensor in self._stored()]

    @torch.no_grad()
    def put_back(self, stored: list[Tensor]) -> None:
        """The model as it was when `stored` was taken; the parameters stay as they are."""
        for tensor, value in zip(self._stored(), stored, strict=True):
            tensor.copy_(value)

    def _stored(self) -> list[Tensor]:
        layers = [groups.layer for groups in self._groups.values()]
        pairs = [tensor for layer in layers for tensor in (layer.scale, layer.zero)]
        return [*pairs, *(vector.stored for vector in self._vectors)]

    def close(self) -> None:
        """The model's own parameters are frozen again, and have no hooks."""
        for vector in self._vectors:
            vector.close()


class _Groups:
    """The scales and zero points of one quantized weight, and their float32 parameters."""

    def __init__(self, layer: QuantWeight) -> None:
        self.layer = layer
        self.codes = layer.codes
        # A loaded model may hold them in a mapped file, which is no place to write to.
        layer.scale, layer.zero = layer.scale.clone(), layer.zero.clone()
        self.first, self.first_zero = layer.scale.float(), layer.zero.float()
        self.change = nn.Parameter(torch.zeros_like(self.first))
        self.exact_zero = nn.Parameter(self.first_zero.clone())
        self.varied = _varied(layer)

    def parameters(self) -> list[nn.Parameter]:
        return [self.change, self.exact_zero]

    def scale(self) -> Tensor:
        """Float32 [rows, groups], rounded to what float16 holds, never to 0."""
        exact = self.first * self.change.exp()
        rounded = _Rounded.apply(exact, torch.float16)
        return torch.where(self.varied & (rounded != 0), rounded, self.first)

    def zero(self) -> Tensor:
        """Float32 [rows, groups], rounded to what float16 holds."""
        rounded = _Rounded.apply(self.exact_zero, torch.float16)
        return torch.where(self.varied, rounded, self.first_zero)


def _varied(layer: QuantWeight) -> Tensor:
    """Which groups have codes that differ: bool [rows, groups]."""
    found = torch.empty(layer.scale.shape, dtype=torch.bool, device=layer.scale.device)
    for part in row_chunks(layer.rows, layer.columns, layer.scale.device):
        codes = unpack(layer.codes[part], layer.bits)
        low, high = codes.unflatten(1, (layer.scale.shape[1], -1)).aminmax(dim=2)
        found[part] = low != high
    return found


class _Vector:
    """A vector of the model in its own dtype, and the float32 parameter that is trained for it."""

    def __init__(self, stored: nn.Parameter) -> None:
        self.stored = stored
        self.exact = nn.Parameter(stored.detach().float().clone())
        self._asked = stored.requires_grad
        stored.requires_grad_(True)  # a frozen one takes no hook
        self._hook = stored.register_post_accumulate_grad_hook(self._hand_over)
        stored.requires_grad_(False)

    def _hand_over(self, stored: Tensor) -> None:
        """The gradient that just came, added up in float32."""
        assert stored.grad is not None
        grad, stored.grad = stored.grad.float(), None
        self.exact.grad = grad if self.exact.grad is None else self.exact.grad.add_(grad)

    def close(self) -> None:
        self._hook.remove()
        self.stored.requires_grad_(self._asked)


class _Linear(nn.Module):
    """A `QuantLinear` with gradients in its scales and zero points."""

    def __init__(self, groups: _Groups, layer: QuantLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self._groups, self._dtype = groups, dtype
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias  # the layer's own

    @property
    def weight(self) -> Tensor:
        """[out, in] in the model's dtype, for who reads a head's weight instead of calling it."""
        groups = self._groups
        return _Dequantized.apply(
            groups.codes, groups.scale(), groups.zero(), groups.layer.bits, self._dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        groups = self._groups
        y = _Product.apply(x, groups.codes, groups.scale(), groups.zero(), groups.layer.bits)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Table(nn.Module):
    """A `QuantEmbedding` with gradients in its scales and zero points."""

    def __init__(self, groups: _Groups, dtype: torch.dtype) -> None:
        super().__init__()
        self._groups, self._dtype = groups, dtype
        self.num_embeddings, self.embedding_dim = groups.layer.rows, groups.layer.columns

    @property
    def weight(self) -> Tensor:
        """[rows, columns] in the dtype that a lookup gives."""
        groups = self._groups
        return _Dequantized.apply(
            groups.codes, groups.scale(), groups.zero(), groups.layer.bits, self._dtype
        )

    def forward(self, ids: Tensor) -> Tensor:
        groups, flat = self._groups, ids.reshape(-1)
        scale, zero = groups.scale()[flat], groups.zero()[flat]
        rows = _Dequantized.apply(groups.codes[flat], scale, zero, groups.layer.bits, self._dtype)
        return rows.view(*ids.shape, self.embedding_dim)


class _Rounded(torch.autograd.Function):
    """Rounds to a dtype, within its range, and back; the gradient goes straight through."""

    @staticmethod
    def forward(ctx, value: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return value.clamp(-LARGEST, LARGEST).to(dtype).float()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _Dequantized(torch.autograd.Function):
    """Packed codes, scale and zero [rows, groups] -> the weight [rows, columns] in a dtype."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(codes, scale, zero)
        ctx.bits = bits
        rows, columns = len(codes), codes.shape[1] * 8 // bits
        weight = torch.empty(rows, columns, dtype=dtype, device=codes.device)
        for part in row_chunks(rows, columns, codes.device):
            weight[part] = scaled(unpack(codes[part], bits), scale[part], zero[part], dtype)
        return weight

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, zero = ctx.saved_tensors
        of_scale, of_zero = torch.empty_like(scale), torch.empty_like(zero)
        for part in row_chunks(len(codes), codes.shape[1] * 8 // ctx.bits, codes.device):
            _group_sums(
                grads[0][part],
                unpack(codes[part], ctx.bits),
                (scale[part], zero[part]),
                (of_scale[part], of_zero[part]),
            )
        return None, of_scale, of_zero, None, None


class _Product(torch.autograd.Function):
    """x [..., columns] times the weight's transpose, [..., rows].

    Keeps the packed codes for the backward pass instead of the dense weight, and has neither that
    nor its gradient whole, but as many rows at a time as a CPU's cache holds.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int
    ) -> Tensor:
        ctx.save_for_backward(x, codes, scale, zero)
        ctx.bits = bits
        flat = x.reshape(-1, x.shape[-1])
        y = flat.new_empty(len(flat), len(codes))
        for part in row_chunks(len(codes), x.shape[-1], x.device):
            weight = scaled(unpack(codes[part], bits), scale[part], zero[part], x.dtype)
            y[:, part] = F.linear(flat, weight)
        return y.view(*x.shape[:-1], len(codes))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scale, zero = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, len(codes))
        of_scale, of_zero = torch.empty_like(scale), torch.empty_like(zero)
        # Over several pieces bfloat16 would round their sum many times.
        of_x = torch.zeros_like(flat, dtype=torch.promote_types(x.dtype, torch.float32))
        for part in row_chunks(len(codes), x.shape[-1], x.device):
            values = unpack(codes[part], ctx.bits)
            rows = grad[:, part]
            if ctx.needs_input_grad[0]:
                of_x += rows @ scaled(values, scale[part], zero[part], x.dtype)
            _group_sums(
                rows.t() @ flat, values, (scale[part], zero[part]), (of_scale[part], of_zero[part])
            )
        return of_x.to(x.dtype).view(x.shape), None, of_scale, of_zero, None


def _group_sums(
    grad: Tensor, codes: Tensor, at: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor]
) -> None:
    """The gradients of scale and zero `at`, [rows, groups], of that of the weight [rows, columns].

    With S = sum of G and Q = sum of G * q over a group: Q - z S and -s S.
    """
    (scale, zero), (of_scale, of_zero) = at, out
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    split = wide.unflatten(1, (scale.shape[1], -1))
    steps = codes.unflatten(1, (scale.shape[1], -1)) - zero.unsqueeze(-1)
    of_scale.copy_((split * steps).sum(2))
    of_zero.copy_(split.sum(2).mul_(scale).neg_())
