"""A quantized model on disk: safetensors + one JSON file + the transformers config beside it.

model.safetensors   packed codes, scales, zeros and unquantized tensors; tied ones once
quant.json          format version, QuantSpec, layers, tied names, meta
config.json  generation_config.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from quant.bytes import stored_tensors
from quant.kernels import Preference, use_kernels
from quant.linear import QuantLinear, quant_linears
from quant.spec import QuantSpec

FORMAT = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "quant.json"


def save_quantized(
    model: PreTrainedModel, folder: str | Path, spec: QuantSpec, meta: dict[str, Any] | None = None
) -> Path:
    """Write a model made by `quantize_model` into `folder` (created) and return the folder.

    `meta` is any JSON-able dict, kept as is. Raises ValueError when nothing in it is quantized.
    """
    layers = quant_linears(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no quantized layer; quantize it first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept, tied = stored_tensors(model)
    description = {
        "format": FORMAT,
        "spec": spec.to_dict(),
        "dtype": _dtype_name(model),
        "layers": {
            name: {
                "in_features": layer.in_features,
                "out_features": layer.out_features,
                "bits": layer.bits,
                "group_size": layer.group_size,
                "bias": layer.bias is not None,
            }
            for name, layer in layers.items()
        },
        "tied": tied,
        "computed": {
            name: _dtype_name(buffer) for name, buffer in _computed_buffers(model, kept).items()
        },
        "meta": meta or {},
    }
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in kept.items()},
        str(folder / WEIGHTS),
        metadata={"format": "pt"},
    )
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True) + "\n")
    return folder


def read_description(folder: str | Path) -> dict[str, Any]:
    """The JSON beside the weights. Raises ValueError when missing or of another format version."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{folder} is no quantized model: it has no {DESCRIPTION}")
    description = json.loads(path.read_text())
    found = description.get("format")
    if found != FORMAT:
        raise ValueError(
            f"{path} has format {found!r}, this program reads format {FORMAT}; "
            "quantize the model again or use the version that wrote it"
        )
    return description


def load_quantized(
    folder: str | Path,
    device: torch.device | str = "cpu",
    prefer: Preference = "speed",
) -> PreTrainedModel:
    """The transformers model that `save_quantized` wrote, ready for `forward` and `generate`.

    Its logits are bit-equal to the saved model's. Raises ValueError when the folder is no
    artifact, is of another format version, or its tensors are not those of the described model.
    """
    folder = Path(folder)
    description = read_description(folder)
    config = AutoConfig.from_pretrained(folder)
    dtype = getattr(torch, description["dtype"])
    with _EmptyOnMeta():  # no memory for dense weights, but real values for computed buffers
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, layer in description["layers"].items():
        model.set_submodule(name, QuantLinear(**layer, dtype=dtype, device="meta"))
    tensors = load_file(folder / WEIGHTS)
    tied: dict[str, str] = description["tied"]
    expected = set(model.state_dict()) - set(tied)
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise ValueError(
            f"{folder / WEIGHTS} does not hold the tensors of the model that {DESCRIPTION} "
            f"describes: {len(odd)} differ, the first is {odd[0]}"
        )
    tensors |= {name: tensors[kept] for name, kept in tied.items()}
    model.load_state_dict(tensors, assign=True)
    model.config.dtype = dtype
    for name, kind in description["computed"].items():
        module, _, attribute = name.rpartition(".")
        owner = model.get_submodule(module)
        setattr(owner, attribute, getattr(owner, attribute).to(getattr(torch, kind)))
    for name, kept in tied.items():
        module, _, attribute = name.rpartition(".")
        source_module, _, source = kept.rpartition(".")
        shared = getattr(model.get_submodule(source_module), source)
        setattr(model.get_submodule(module), attribute, shared)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise ValueError(f"{folder}: {type(model).__name__} needs {name}, which is not stored")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.requires_grad_(False)
    model = model.eval().to(device)
    use_kernels(model, prefer)
    return model


def _computed_buffers(model: PreTrainedModel, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Buffers that the architecture computes when it is built (not stored), by name."""
    layers = quant_linears(model)
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name not in stored and name.rpartition(".")[0] not in layers
    }


def _dtype_name(holder: PreTrainedModel | Tensor) -> str:
    return str(holder.dtype).removeprefix("torch.")


class _EmptyOnMeta(TorchFunctionMode):
    """Within the block `torch.empty` (how layers allocate weights) gives tensors without memory.

    All else is computed as usual, so that buffers which are not stored, such as a rotary
    embedding's frequencies, get their values: under `torch.device("meta")` they would be lost.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
