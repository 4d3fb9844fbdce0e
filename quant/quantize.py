"""Replaces the linear layers of a model by QuantLinear layers with hqq's codes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quant.linear import QuantLinear
from quant.methods import quantize_weight
from quant.pack import BLOCK
from quant.spec import QuantSpec


def quantizable_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every `nn.Linear` of the model by name, except the output head.

    The head stays in 16 bits: it is often tied to the embedding. Subclasses of nn.Linear are left
    alone, for their forward may differ. Raises ValueError when no layer is left.
    """
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no torch.nn.Linear layers besides its head: "
            "this architecture cannot be quantized"
        )
    return layers


def check_group_size(
    config_or_model: PreTrainedConfig | PreTrainedModel, group_sizes: Iterable[int]
) -> None:
    """Raise ValueError (one line) unless each group size divides every quantizable layer's width.

    A transformers config is enough: the model is then built without weights, on the meta device.
    """
    model = config_or_model
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_or_model)
    widths = {name: layer.in_features for name, layer in quantizable_linears(model).items()}
    common = math.gcd(*widths.values())
    choices = [size for size in range(BLOCK, common + 1, BLOCK) if common % size == 0]
    for name, width in widths.items():
        if width % BLOCK:
            raise ValueError(
                f"layer {name} is {width} weights wide, which is no multiple of {BLOCK}: "
                "no group size does; this model cannot be quantized"
            )
    for size in group_sizes:
        for name, width in widths.items():
            if size < BLOCK or size % BLOCK or width % size:
                raise ValueError(
                    f"group_size {size} does not do for layer {name}, which is {width} weights "
                    f"wide; for this model it may be {', '.join(map(str, choices))}"
                )


def quantize(
    model: PreTrainedModel, spec: QuantSpec, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """Quantize `model` in place and return it; the layers are named by `quantizable_linears`.

    Everything else (embeddings, head, norms, biases) becomes `dtype`, tied weights stay tied.
    Raises ValueError for a spec that hqq or the model's layer widths do not allow.
    """
    assert isinstance(spec.group_size, int)
    check_group_size(model, [spec.group_size])
    done: dict[int, QuantLinear] = {}
    for name, linear in quantizable_linears(model).items():
        try:
            weight = quantize_weight(linear.weight, spec.bits, spec.group_size, spec.method)
        except RuntimeError as error:
            raise RuntimeError(f"layer {name}: {error}") from error
        done[id(linear)] = QuantLinear.from_codes(weight, linear.bias)
    # A module used under two names is one module afterwards too.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in done:
            model.set_submodule(name, done[id(module)])
    cast_stored(model, dtype)
    model.requires_grad_(False)
    return model


def cast_stored(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast parameters and unquantized persistent buffers to `dtype`, in place, ties kept.

    Unlike `model.to(dtype)`, buffers that are recomputed and never stored (a rotary embedding's
    frequencies) stay in float32, as `from_pretrained(dtype=...)` has them.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))
    model.config.dtype = dtype
