"""How many bytes a model really takes, and how many bits per weight that is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cluster.storage.strict_json import broken
from quant.artifact.safetensors_file import Slot
from quant.codes import packed_width
from quant.layers.linear import QuantWeight
from quant.quant_spec import CHANNEL, QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("codes", "scale", "zero")


def stored_layers(model: nn.Module) -> tuple[dict[str, QuantWeight], dict[str, str]]:
    """The quantized layers: (by name, each once; {another name: the name it is kept under}).

    A head that shares an embedding's codes is a layer of its own and tied to the embedding.
    """
    layers: dict[str, QuantWeight] = {}
    tied: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantWeight):
            if id(module) in names:
                tied[name] = names[id(module)]
            else:
                layers[name], names[id(module)] = module, name
    for name, layer in layers.items():
        embedding = getattr(layer, "shared", None)
        if embedding is not None and id(embedding) in names:
            tied[name] = names[id(embedding)]
    return layers, tied


def plain_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and persistent buffers, without quantized layers' codes, scales and zeros:
    (by name, each once; {another name of it: the name it is kept under})."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[object, str] = {}
    layers: dict[int, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own: list[tuple[str, Tensor | None]] = list(module._parameters.items())
        if not isinstance(module, QuantWeight):
            hidden = module._non_persistent_buffers_set
            own += [
                (name, buffer) for name, buffer in module._buffers.items() if name not in hidden
            ]
        elif layers.setdefault(id(module), prefix) != prefix:
            continue  # a quantized layer under another name: tied as a whole
        for attribute, tensor in own:
            if tensor is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            # Two parameter objects may share one storage; on the meta device all pointers are 0.
            key: object = id(tensor)
            if tensor.device.type != "meta" and tensor.numel():
                key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if key in names:
                tied[name] = names[key]
            else:
                names[key] = name
                kept[name] = tensor.detach()
    return kept, tied


def layer_slots(rows: int, columns: int, bits: int, group_size: int) -> dict[str, Slot]:
    """Dtype and shape of what a file holds of a quantized weight: codes, scale and zero."""
    groups = Slot(torch.float16, (rows, columns // group_size))
    codes = Slot(torch.uint8, (rows, packed_width(columns, bits)))
    return dict(zip(PARTS, (codes, groups, groups), strict=True))


def stored_slots(model: nn.Module) -> dict[str, Slot]:
    """Dtype and shape of every tensor that a file of the model holds, tied ones once."""
    plain, _ = plain_tensors(model)
    slots = {name: Slot(tensor.dtype, tuple(tensor.shape)) for name, tensor in plain.items()}
    layers, tied = stored_layers(model)
    for name, layer in layers.items():
        if name not in tied:
            parts = layer_slots(layer.rows, layer.columns, layer.bits, layer.group_size)
            slots |= {f"{name}.{part}": slot for part, slot in parts.items()}
    return slots


def stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file of the model holds: (tensors by name, each once; {tied name: kept name}).

    Codes are in the layout of the file, whatever layout a kernel holds them in.
    """
    kept, tied = plain_tensors(model)
    layers, tied_layers = stored_layers(model)
    for name, layer in layers.items():
        if name not in tied_layers:
            kept |= {f"{name}.{part}": tensor for part, tensor in layer.stored().items()}
    tied |= {f"{a}.{part}": f"{b}.{part}" for a, b in tied_layers.items() for part in PARTS}
    return kept, tied


def true_bytes(model: nn.Module) -> int:
    """All bytes of codes, scales, zeros and unquantized tensors, tied ones once: those of the
    file's tensors, whatever a kernel holds in memory."""
    return sum(slot.bytes for slot in stored_slots(model).values())


def parameter_count(model: nn.Module) -> int:
    """Number of weights, tied ones once; of a quantized model: of the model it was made from."""
    layers, tied = stored_layers(model)
    quantized = sum(w.rows * w.columns for name, w in layers.items() if name not in tied)
    plain, _ = plain_tensors(model)  # not model.parameters(): two of them may share one memory
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return quantized + sum(plain[name].numel() for name in plain.keys() & parameters)


def true_bits_per_weight(model: nn.Module) -> float:
    """`true_bytes` in bits over `parameter_count`: scales, embeddings and head included."""
    return 8 * true_bytes(model) / parameter_count(model)


def dense_bytes(model: nn.Module, bytes_per_weight: int = 2) -> int:
    """Bytes of the unquantized model as deployed, in 16 bits unless told otherwise."""
    return parameter_count(model) * bytes_per_weight


def sixteen_bit_share(
    model: PreTrainedModel, spec: QuantSpec, layers: Mapping[str, QuantSpec | None] | None = None
) -> float:
    """The share of the bytes that stays in 16 bits when the model is quantized.

    model: unquantized; on the meta device will do. Raises ValueError for what `find_targets`
    refuses.
    """
    from quant.targets import find_targets

    coded = weights = 0
    for target in find_targets(model, spec, layers).layers.values():
        size = target.columns if target.spec.group_size == CHANNEL else target.spec.group_size
        slots = layer_slots(target.rows, target.columns, target.spec.bits, int(size))
        coded += sum(slot.bytes for slot in slots.values())
        weights += target.weights
    kept = dense_bytes(model) - 2 * weights
    return kept / (kept + coded)


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files in a folder and below, as a download of it takes. Raises ValueError
    when it is no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise broken(folder, "this is no folder")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
