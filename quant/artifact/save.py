"""Writes a quantized model to disk: the same bytes for the same model, whole or not at all."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from cluster.storage.strict_json import SIZE_LIMIT, parse_object
from quant.artifact.atomic_folder import whole_folder
from quant.artifact.description import DESCRIPTION, FORMAT, WEIGHTS, parse_description
from quant.artifact.meta_model import CONFIG, GENERATION
from quant.artifact.safetensors_file import NAMES, write_tensors
from quant.artifact.sizes import (
    parameter_count,
    plain_tensors,
    stored_layers,
    stored_slots,
    true_bytes,
)
from quant.layers.linear import QuantEmbedding, QuantLinear, QuantWeight
from quant.quant_spec import DYNAMIC, QuantSpec
from trainer.corpus.tokenizer import is_tokenizer_file


def save_quantized(
    model: PreTrainedModel, folder: str | Path, spec: QuantSpec, meta: dict[str, Any] | None = None
) -> Path:
    """Write a quantized model into `folder` (created) and return the folder.

    It appears whole or not at all; a quantized model that is there already is replaced, tokenizer
    files are left in place, and a folder that holds anything else is refused. The same model gives
    the same bytes. `meta` is any JSON-able dict, kept as is. Raises ValueError (one line) when
    nothing in the model is quantized, or it could not be loaded again.
    """
    folder = Path(folder)
    description = _description(model, spec, meta or {})
    text = json.dumps(description, indent=1, sort_keys=True) + "\n"
    with whole_folder(folder, is_tokenizer_file, _replaceable) as new:
        _save_configs(model, new)
        write_tensors(new / WEIGHTS, stored_slots(model), _groups(model))
        (new / DESCRIPTION).write_text(text)
        for name in (CONFIG, DESCRIPTION):
            _sync(new / name)
    return folder


def _description(model: PreTrainedModel, spec: QuantSpec, meta: dict[str, Any]) -> dict[str, Any]:
    """The content of quant.json. Raises ValueError as `save_quantized` does."""
    layers, tied_layers = stored_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no quantized layer; quantize it first")
    _check_class(model)
    kept, tied = plain_tensors(model)
    for name, tensor in kept.items():
        if tensor.dtype not in NAMES or tensor.device.type == "meta":
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}: it cannot be stored")
    description = {
        "format": FORMAT,
        "spec": spec.to_dict(),
        "dtype": _dtype_name(_compute_dtype(model, layers)),
        "layers": {name: _layer(layer, spec) for name, layer in layers.items()},
        "tied": tied | tied_layers,
        "computed": {name: _dtype_name(b.dtype) for name, b in computed_buffers(model).items()},
        "meta": meta,
        "bytes": true_bytes(model),
        "parameters": parameter_count(model),
    }
    try:
        data = json.dumps(description, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"meta must be JSON: {error}") from None
    if len(data) > SIZE_LIMIT // 2:  # indented it takes more
        raise ValueError(f"meta takes {len(data)} bytes as JSON; may be at most {SIZE_LIMIT // 2}")
    parse_description(parse_object(data, Path(DESCRIPTION)), Path(DESCRIPTION))
    return description


def _check_class(model: PreTrainedModel) -> None:
    """Only what transformers builds from the config alone can be loaded again."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    built = [each for each in (found if isinstance(found, tuple) else (found,)) if each]
    kind = type(model).__name__
    if not any(isinstance(model, each) and kind == each.__name__ for each in built):
        names = " or ".join(each.__name__ for each in built) or "nothing"
        raise ValueError(
            f"a {kind} could not be loaded again: AutoModelForCausalLM builds {names} for a "
            f"{type(model.config).__name__}"
        )


def _save_configs(model: PreTrainedModel, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # as transformers' own save_pretrained does
    config.save_pretrained(folder)
    if model.generation_config is None:
        return
    try:
        model.generation_config.save_pretrained(folder)
    except ValueError as error:
        cause = " ".join(str(error).split())[:300]
        raise ValueError(f"model.generation_config cannot be saved: {cause}") from None


def _layer(layer: QuantWeight, spec: QuantSpec) -> dict[str, Any]:
    return {
        "kind": "embedding" if isinstance(layer, QuantEmbedding) else "linear",
        "bits": layer.bits,
        "group_size": layer.group_size,
        "rows": layer.rows,
        "columns": layer.columns,
        "bias": isinstance(layer, QuantLinear) and layer.bias is not None,
        "activations": getattr(layer, "activations", None),
        "method": _method(layer, spec),
    }


def _method(layer: QuantWeight, spec: QuantSpec) -> str:
    """What the codes were made by, as far as the layer or the embedding it shares says so."""
    source = getattr(layer, "shared", None) or layer
    said = getattr(source, "method", None)
    return said or (DYNAMIC if getattr(layer, "activations", None) else spec.method)


def _compute_dtype(model: PreTrainedModel, layers: dict[str, QuantWeight]) -> torch.dtype:
    """Of what is not quantized: what an embedding looks up, or else the model's own dtype."""
    for layer in layers.values():
        if isinstance(layer, QuantEmbedding):
            return layer.dtype
    return model.dtype


def _groups(model: PreTrainedModel) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """The tensors of the file in groups, each made when it is asked for: a kernel's layout is
    turned back into the stored one for a layer at a time."""
    plain, _ = plain_tensors(model)
    yield lambda: plain
    layers, tied = stored_layers(model)
    for name, layer in layers.items():
        if name not in tied:
            yield partial(_parts, name, layer)


def _parts(name: str, layer: QuantWeight) -> dict[str, Tensor]:
    parts = layer.stored()
    for part in ("scale", "zero"):
        bad = int((~parts[part].isfinite()).sum())
        if bad:
            raise ValueError(f"{name}: {bad} values of its {part} are not finite; quantize again")
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that the architecture computes when it is built (not stored), by name."""
    found = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, QuantWeight):
            for name in sorted(module._non_persistent_buffers_set):
                buffer = module._buffers.get(name)
                if buffer is not None:
                    found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _replaceable(folder: Path) -> set[str]:
    """Files of a quantized model, of this format or the first, if the folder holds one."""
    if not (folder / DESCRIPTION).is_file():
        return set()
    return {WEIGHTS, DESCRIPTION, CONFIG, GENERATION, "model.safetensors"}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
