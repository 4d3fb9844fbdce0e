"""Whether description, weights' file and config of an artifact belong together."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cluster.storage.strict_json import broken, shown
from quant.artifact.description import AGAIN, DESCRIPTION, Description, LayerEntry
from quant.artifact.safetensors_file import MappedTensors, Slot
from quant.artifact.sizes import layer_slots


def check_fit(
    description: Description, file: MappedTensors, model: PreTrainedModel, folder: Path
) -> None:
    """Raise ValueError (one line) unless the file holds just the tensors of the described model.

    model: built from the config on the meta device, not quantized.
    """
    path = folder / DESCRIPTION
    kind = type(model).__name__
    if description.bytes != file.bytes:
        raise broken(
            path,
            f"bytes is {shown(description.bytes)}, the tensors in {file.path.name} have "
            f"{file.bytes}; {AGAIN}",
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    aliases = description.aliases()
    for name in (*description.layers, *aliases):
        entry = description.layers[aliases.get(name, name)]
        if name not in modules:
            raise broken(path, f"layers: {name} is no module of a {kind}; {AGAIN}")
        _check_layer(name, modules[name], entry, path)
    quantized = set(description.layers) | set(aliases)
    plain = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name.rpartition(".")[0] not in quantized
    }
    tied = description.tied_tensors()
    for name, kept in tied.items():
        for each in (name, kept):
            if each not in plain:
                raise broken(path, f"tied: {each} is no tensor of a {kind}; {AGAIN}")
        if plain[name].shape != plain[kept].shape:
            raise broken(path, f"tied: {name} and {kept} have different shapes; {AGAIN}")
    expected = _expected_codes(description)
    expected |= {name: _slot(tensor) for name, tensor in plain.items() if name not in tied}
    _check_tensors(expected, file, kind)
    _check_computed(description, model, path)
    parameters = {name for name, tensor in plain.items() if isinstance(tensor, nn.Parameter)}
    _check_count(description, file, parameters, path)


def _check_layer(name: str, module: nn.Module, entry: LayerEntry, path: Path) -> None:
    weight = getattr(module, "weight", None)
    kinds = (nn.Embedding,) if entry.kind == "embedding" else (nn.Linear, Conv1D)
    if not isinstance(module, kinds) or not isinstance(weight, Tensor):
        raise broken(
            path, f"layers: {name} is a {type(module).__name__}, not of kind {entry.kind}; {AGAIN}"
        )
    shape = list(weight.t().shape if isinstance(module, Conv1D) else weight.shape)
    if shape != [entry.rows, entry.columns]:
        raise broken(
            path,
            f"layers: {name} has {shown(entry.rows)} rows and {shown(entry.columns)} columns; "
            f"by the config it has {shape}; {AGAIN}",
        )
    if entry.bias != (getattr(module, "bias", None) is not None):
        raise broken(path, f"layers: {name} has bias {entry.bias}, the config differs; {AGAIN}")


def _expected_codes(description: Description) -> dict[str, Slot]:
    """The tensors of the quantized layers; a dtype of float32 stands for any float."""
    shares = description.shares()
    expected: dict[str, Slot] = {}
    for name, entry in description.layers.items():
        if entry.bias:
            expected[f"{name}.bias"] = Slot(torch.float32, (entry.rows,))
        if name not in shares:
            parts = layer_slots(entry.rows, entry.columns, entry.bits, entry.group_size)
            expected |= {f"{name}.{part}": slot for part, slot in parts.items()}
    return expected


def _check_tensors(expected: dict[str, Slot], file: MappedTensors, kind: str) -> None:
    for state, names in (
        ("is missing", set(expected) - set(file.slots)),
        (f"belongs to no {kind} as described", set(file.slots) - set(expected)),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise broken(file.path, f"tensor {min(names)} {state}{more}; {AGAIN}")
    for name, slot in expected.items():
        found = file.slots[name]
        if found.shape != slot.shape:
            raise broken(
                file.path,
                f"tensor {name} has shape {shown(list(found.shape))}, must have "
                f"{shown(list(slot.shape))}; {AGAIN}",
            )
        part = name.rpartition(".")[2]
        exact = slot.dtype != torch.float32
        if found.dtype != slot.dtype if exact else not found.dtype.is_floating_point:
            wanted = slot.dtype if exact else "a floating dtype"
            raise broken(
                file.path, f"tensor {name} ({part}) is {found.dtype}, must be {wanted}; {AGAIN}"
            )


def _check_computed(description: Description, model: PreTrainedModel, path: Path) -> None:
    stored = set(model.state_dict())
    buffers = {name: b for name, b in model.named_buffers() if name not in stored}
    for name, dtype in description.computed.items():
        if name not in buffers:
            raise broken(
                path,
                f"computed: {name} is no computed buffer of a {type(model).__name__}; {AGAIN}",
            )
        kind = getattr(torch, dtype)
        found = buffers[name].dtype
        if kind != found and not (kind.is_floating_point and found.is_floating_point):
            raise broken(path, f"computed: {name} is {dtype}, by the config {found}; {AGAIN}")


def _check_count(
    description: Description, file: MappedTensors, parameters: set[str], path: Path
) -> None:
    layers, shares = description.layers, description.shares()
    count = sum(e.rows * e.columns for name, e in layers.items() if name not in shares)
    biases = {f"{name}.bias" for name, entry in layers.items() if entry.bias}
    for name in file.slots:
        if name in parameters or name in biases:
            shape = file.slots[name].shape
            count += torch.Size(shape).numel()
    if count != description.parameters:
        raise broken(
            path,
            f"parameters is {shown(description.parameters)}, the described tensors have "
            f"{count}; {AGAIN}",
        )


def _slot(tensor: Tensor) -> Slot:
    kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return Slot(kind, tuple(tensor.shape))
