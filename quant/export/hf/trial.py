"""A stock dense model in memory with the weights of an export in it: what the export will answer.

The weights are computed as compressed-tensors computes them, so the KL measured here is that of
the files, up to the order of additions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant.artifact.meta_model import EmptyOnMeta
from quant.evaluation.batches import CountedLogits
from quant.evaluation.kl import full_kl
from quant.export.hf.compressed_tensors import Packed
from quant.layers.linear import quant_weights

CHUNK = 256  # positions whose logits are at hand at once
INT8 = 127.5  # compressed-tensors' range of int8 inputs: half of 255 steps


def stock_model(model: PreTrainedModel) -> PreTrainedModel:
    """An unquantized transformers model of the same config, dtype, device and weights.

    Weights that are not quantized are `model`'s own, in the same memory.
    Raises ValueError when a quantized layer is none that a stock model has as `nn.Linear` or
    `nn.Embedding` of the same shape.
    """
    config = copy.deepcopy(model.config)
    with EmptyOnMeta():
        dense = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    layers = quant_weights(model)
    for name, layer in layers.items():
        stock = dense.get_submodule(name)
        if type(stock) not in (nn.Linear, nn.Embedding):
            raise ValueError(
                f"layer {name} is a {type(stock).__name__} in a stock {type(dense).__name__}: "
                "compressed-tensors holds torch.nn.Linear and Embedding; export to gguf instead"
            )
        if stock.weight.shape != (layer.rows, layer.columns):
            raise ValueError(
                f"layer {name} is [{layer.rows}, {layer.columns}], in a stock "
                f"{type(dense).__name__} of this config it is {list(stock.weight.shape)}"
            )
    own = {name: kept for name, kept in model.state_dict().items() if _owner(name, layers) is None}
    held = {*own, *(f"{name}.weight" for name in layers)}
    held |= {f"{name}.bias" for name, layer in layers.items() if _bias(layer) is not None}
    there = dense.state_dict(keep_vars=True)
    tied = getattr(dense, "all_tied_weights_keys", None) or {}
    odd = [name for name in there if name not in held and name not in tied]
    odd += [name for name in held if name not in there]
    if odd:
        raise ValueError(
            f"a stock {type(dense).__name__} has not the tensors of this model: {len(odd)} differ, "
            f"the first is {odd[0]}"
        )
    made: dict[Tensor, Tensor] = {}  # one for all names of a tied weight
    for name, empty in there.items():
        if name in held and empty not in made:
            parent, _, last = name.rpartition(".")
            if parent not in layers:
                filled = own[name]
            elif last == "bias":
                filled = _bias(layers[parent])
            else:
                filled = layers[parent].dequantize(model.dtype)
            filled = filled.detach().to(empty.dtype)
            if isinstance(empty, nn.Parameter):
                filled = nn.Parameter(filled, requires_grad=False)
            made[empty] = filled
    for name, empty in there.items():
        parent, _, last = name.rpartition(".")
        setattr(dense.get_submodule(parent), last, made[empty])
    nn.Module.to(dense, model.device)
    dense.generation_config = copy.deepcopy(model.generation_config)
    return dense.eval().requires_grad_(False)


def _bias(layer: nn.Module) -> Tensor | None:
    return getattr(layer, "bias", None)


def put(dense: PreTrainedModel, packed: Mapping[str, Packed]) -> None:
    """Give `dense` the weights that the file of `packed` has, in place."""
    for name, layer in packed.items():
        held = dense.get_parameter(f"{name}.weight").data
        held.copy_(layer.weight(held.dtype))


@contextmanager
def quantized_inputs(dense: PreTrainedModel, packed: Mapping[str, Packed]) -> Iterator[None]:
    """Within the block the inputs of "dynamic" layers are rounded to int8 per token."""
    with _hooks(
        dense,
        [name for name, layer in packed.items() if layer.scheme.kind == "dynamic"],
        lambda name: lambda module, inputs: (_int8(inputs[0]), *inputs[1:]),
    ):
        yield


def importance(dense: PreTrainedModel, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Mean squared input of each column of the layers `names`: float32 `[in]` by layer name."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].float().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return see

    head = dense.get_output_embeddings()
    with_head = any(dense.get_submodule(name) is head for name in names)
    with _hooks(dense, names, watch), torch.inference_mode():
        for sequence in ids:
            kept = _run(dense, sequence)
            # The head sees a chunk at a time: all logits of a sequence would not fit.
            for first in range(0, len(kept) if with_head else 0, CHUNK):
                kept.chunk(first, min(first + CHUNK, len(kept)))
    return {name: total.clone() / ids.numel() for name, total in sums.items()}


class Reference:
    """A model's last hidden states over calibration ids, to measure other models against it.

    ids: int64 `[n, seq]`. Hidden states are kept, not logits: those of a big vocabulary would not
    fit. The head is applied again for every comparison.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self._ids = ids
        self._kept = [_run(model, sequence) for sequence in ids]

    @torch.inference_mode()
    def compare(self, model: PreTrainedModel) -> tuple[float, float]:
        """(mean KL(reference || model) in nats, share of positions with the same first choice)."""
        divergence, agreed, count = 0.0, 0.0, 0
        for sequence, kept in zip(self._ids, self._kept, strict=True):
            other = _run(model, sequence)
            for first in range(0, len(kept), CHUNK):
                last = min(first + CHUNK, len(kept))
                own, theirs = kept.chunk(first, last), other.chunk(first, last)
                agreed += float((own.argmax(-1) == theirs.argmax(-1)).sum())
                logs = [torch.log_softmax(logits, -1) for logits in (own, theirs)]
                divergence += float(full_kl(*logs).double().sum())
            count += len(kept)
        return divergence / count, agreed / count


def _run(model: PreTrainedModel, sequence: Tensor) -> CountedLogits:
    ids = sequence[None].to(model.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return CountedLogits(model, ids, positions, torch.ones_like(ids, dtype=torch.bool))


def _int8(x: Tensor) -> Tensor:
    """Per-token symmetric rounding as compressed-tensors does it, in x's dtype."""
    scale = x.abs().amax(-1, keepdim=True) / INT8
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    return (x / scale).clamp(-128, 127).round() * scale


@contextmanager
def _hooks(
    model: nn.Module, names: list[str], make: Callable[[str], Callable[..., Any]]
) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_pre_hook(make(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _owner(name: str, layers: Mapping[str, Any]) -> str | None:
    """The quantized layer that a tensor of the state_dict belongs to."""
    parent = name.rpartition(".")[0]
    while parent:
        if parent in layers:
            return parent
        parent = parent.rpartition(".")[0]
    return None
