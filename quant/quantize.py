"""Quantizes a transformers model in place, layer by layer: `quantize(model, QuantSpec(4, 64))`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant.artifact.quantized_model import mark_quantized
from quant.layers.linear import QuantEmbedding, QuantLinear, QuantWeight, quant_weights
from quant.methods import quantize_weight
from quant.quant_spec import DYNAMIC, QuantSpec
from quant.targets import Layers, Target, Targets, check_group_size, find_targets
from trainer.models.load import cast_stored

__all__ = ["check_group_size", "quantize", "stored_dtype"]

Progress = Callable[[int, int], None]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def quantize(
    model: PreTrainedModel,
    spec: QuantSpec,
    layers: Layers | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Quantize `model` in place and return it, ready for `forward`, `generate`, `save_pretrained`.

    spec: of all linear layers but the head, which `find_targets` names; embeddings and head by its
    flags. layers: names or globs of modules with a spec of their own, or None to leave them in 16
    bits; the first that matches counts. dtype: of all that is not quantized; None: as it is
    (`stored_dtype` is what a folder of 16-bit parts has). device: where the
    arithmetic runs; None takes a CUDA device if there is one, else where the weight lies. Layers
    stay on the device that they are on. progress: called with the number of weights done and of
    all, after each layer.

    Memory: the model and one layer; each weight is freed once it is quantized.
    Raises ValueError (one line) for what `find_targets` refuses, a quantized model, weights that
    are not finite or not in memory: the model is as it was then. Raises RuntimeError naming a
    layer whose scales exceed float16: the layers before it are quantized, load the model again.
    """
    _check_arguments(model, spec, dtype)
    dtype = dtype or model.dtype
    targets = find_targets(model, spec, layers)
    _check_weights(model, targets)
    total = sum(target.weights for target in targets.layers.values())
    done = 0
    for name, target in targets.layers.items():
        try:
            _replace(model, target, dtype, device)
        except RuntimeError as error:
            begun = "; the layers before it are quantized: load the model again" if done else ""
            raise RuntimeError(f"layer {name}: {error}{begun}") from error
        done += target.weights
        if progress is not None:
            progress(done, total)
    cast_stored(model, dtype)
    model.requires_grad_(False)
    return mark_quantized(model, spec)


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """What is not quantized is stored in: the model's own 16 bits, or bfloat16 for wider ones."""
    return model.dtype if model.dtype.itemsize == 2 else torch.bfloat16


@torch.no_grad()
def _replace(
    model: PreTrainedModel,
    target: Target,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> None:
    """Put a quantized layer in the place of one target; nothing holds its weight afterwards."""
    weight, bias = _weight_of(model, target)
    codes = quantize_weight(
        weight.to(_device(weight, device)).contiguous(),
        target.spec.bits,
        target.spec.group_size,
        target.spec.method,
    )
    if target.kind in ("linear", "conv1d"):
        layer: QuantWeight = QuantLinear.from_codes(codes, bias, _activations(target.spec))
    else:
        layer = QuantEmbedding.from_codes(codes, dtype)
    layer.to(weight.device)
    layer.method = target.spec.method  # what the codes were made by, for the artifact
    if target.head_names:
        assert isinstance(layer, QuantEmbedding)
        head = QuantLinear.share(layer, _activations(target.spec))
        head.method = layer.method
        head.bias = _frozen(getattr(model.get_submodule(target.head_names[0]), "bias", None))
        for name in target.head_names:
            model.set_submodule(name, head)
    for name in target.names:
        model.set_submodule(name, layer)


def _activations(spec: QuantSpec) -> Literal["int8"] | None:
    return "int8" if spec.method == DYNAMIC else None


def _frozen(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)


def _weight_of(model: PreTrainedModel, target: Target) -> tuple[Tensor, Tensor | None]:
    """The weight `[rows, columns]` of a target and its bias."""
    module = model.get_submodule(target.names[0])
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return weight.t() if target.kind == "conv1d" else weight, bias


def _device(weight: Tensor, asked: torch.device | str | None) -> torch.device:
    if asked is not None:
        return torch.device(asked)
    if weight.device.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    return weight.device


def _check_arguments(model: PreTrainedModel, spec: QuantSpec, dtype: torch.dtype | None) -> None:
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {kind}; may be a transformers PreTrainedModel")
    if not isinstance(spec, QuantSpec):
        raise ValueError(f"spec is {spec!r}; may be a QuantSpec, e.g. QuantSpec(4, 64)")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}; may be {', '.join(map(str, FLOATS))}")
    by = getattr(model.config, "quantization_config", None)
    if quant_weights(model) or by is not None or getattr(model, "hf_quantizer", None) is not None:
        done = getattr(model, "quant_spec", None)
        how = f" ({done.key})" if done is not None else ""
        raise ValueError(f"{kind} is quantized already{how}; load the 16-bit model again")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{kind} carries an adapter; merge it into the weights first")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            f"{kind} is spread over devices or offloaded by accelerate; load it without device_map"
        )


def _check_weights(model: PreTrainedModel, targets: Targets) -> None:
    """All weights must be there and finite; found out now, while the model is whole."""
    for name, target in targets.layers.items():
        weight, _ = _weight_of(model, target)
        if weight.is_meta:
            raise ValueError(f"layer {name} is on the meta device: load the model's weights first")
        if not weight.is_floating_point():
            raise ValueError(f"layer {name} holds {weight.dtype}; may be a floating dtype")
        extremes = torch.stack(weight.detach().aminmax())  # both are nan if any weight is
        if not extremes.isfinite().all():
            raise ValueError(f"layer {name} has weights that are not finite: nothing to quantize")
