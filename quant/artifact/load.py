"""Reads a quantized model from disk: everything is checked first, then taken layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from cluster.storage.strict_json import broken
from quant.artifact.description import (
    AGAIN,
    DESCRIPTION,
    WEIGHTS,
    Description,
    LayerEntry,
    parse_description,
    read_description,
)
from quant.artifact.meta_model import (
    CONFIG,
    GENERATION,
    check_generation_config,
    checked_meta_model,
    hollow_model,
    read_config,
)
from quant.artifact.quantized_model import mark_quantized
from quant.artifact.safetensors_file import MappedTensors
from quant.artifact.sizes import PARTS
from quant.artifact.validate import check_fit
from quant.kernels import Preference, use_kernels
from quant.layers.linear import QuantEmbedding, QuantLinear, QuantWeight
from trainer.models.load import cast_stored


def load_quantized(
    folder: str | Path,
    device: torch.device | str = "cpu",
    prefer: Preference = "speed",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The transformers model that `save_quantized` wrote, ready for `forward` and `generate`.

    On a CPU its tensors lie in a memory mapping of the file, except those that a kernel lays out
    anew, whose pages are given back layer by layer. `prefer` is `quant.kernels.use_kernels`'s.
    `dtype`: what it computes in, and so of what is not quantized; None: as that is stored.
    Raises ValueError (one line) when the folder is no artifact, is of another format version, or
    its files are broken or do not belong together; nothing in it is ever run as code.
    """
    folder = Path(folder)
    if prefer not in get_args(Preference):
        raise ValueError(f"prefer {prefer!r} is unknown; may be {', '.join(get_args(Preference))}")
    place = _usable(device)
    description = parse_description(read_description(folder), folder / DESCRIPTION)
    file = MappedTensors(folder / WEIGHTS)
    names = len(file.slots) + len(description.tied)
    config = read_config(folder, names)
    has_generation = check_generation_config(folder)
    check_fit(description, file, checked_meta_model(config, folder / CONFIG, names), folder)
    model = hollow_model(config)
    loader = _Loader(model, description, file, place)
    loader.layers(prefer)
    loader.plain()
    loader.finish()
    if dtype is not None:
        cast_stored(model, dtype)
    if has_generation:
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise broken(folder / GENERATION, f"it is broken ({error}); {AGAIN}") from None
    return mark_quantized(model, description.spec.spec())


def _usable(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (AssertionError, RuntimeError, TypeError) as error:
        cause = str(error).split("\n")[0]
        raise ValueError(f"device {device!r} cannot be used here ({cause}); may be cpu") from None
    if place.type == "meta":
        raise ValueError("device 'meta' has no memory for a model; may be cpu or cuda")
    return place


class _Loader:
    """Fills a hollow model with the tensors of a file, which were checked to fit."""

    def __init__(
        self,
        model: PreTrainedModel,
        description: Description,
        file: MappedTensors,
        device: torch.device,
    ) -> None:
        self.model = model
        self.description = description
        self.file = file
        self.device = device
        self.dtype = getattr(torch, description.dtype)

    def layers(self, prefer: Preference) -> None:
        """Make each quantized layer, give it to the kernels, and its pages back."""
        described = self.description
        shares = described.shares()
        made: dict[str, QuantWeight] = {}
        # A head takes over the codes of an embedding, which must be there first.
        for name in sorted(described.layers, key=lambda name: name in shares):
            entry = described.layers[name]
            if entry.kind == "embedding":
                made[name] = self._embedding(name, entry)
            else:
                table = made[shares[name]] if name in shares else None
                made[name] = self._linear(name, entry, table)
            made[name].method = entry.method
            use_kernels(made[name], prefer)
            self.file.release(f"{name}.{part}" for part in PARTS if name not in shares)
        for name, layer in made.items():
            self.model.set_submodule(name, layer)
        for name, kept in described.aliases().items():
            self.model.set_submodule(name, made[kept])

    def _embedding(self, name: str, entry: LayerEntry) -> QuantEmbedding:
        widths = (entry.rows, entry.columns, entry.bits, entry.group_size)
        layer = QuantEmbedding(*widths, dtype=self.dtype, device="meta")
        self._fill(layer, name)
        return layer

    def _linear(self, name: str, entry: LayerEntry, table: QuantWeight | None) -> QuantLinear:
        if isinstance(table, QuantEmbedding):
            layer = QuantLinear.share(table, entry.activations)
        else:
            widths = (entry.columns, entry.rows, entry.bits, entry.group_size)
            layer = QuantLinear(*widths, device="meta", activations=entry.activations)
            self._fill(layer, name)
        if entry.bias:
            layer.bias = nn.Parameter(self.take(f"{name}.bias"), requires_grad=False)
        return layer

    def _fill(self, layer: QuantWeight, name: str) -> None:
        for part in PARTS:
            tensor = self.take(f"{name}.{part}")
            if part != "codes" and not bool(tensor.isfinite().all()):
                raise broken(self.file.path, f"{name}.{part} is not finite everywhere; {AGAIN}")
            setattr(layer, part, tensor)

    def plain(self) -> None:
        """Take everything that is not quantized; tied tensors become one."""
        layers = self.description.layers
        names = {name: name for name in self.file.slots if name.rpartition(".")[0] not in layers}
        taken: dict[str, Tensor] = {}
        for name, kept in (names | self.description.tied_tensors()).items():
            owner, attribute = _owner(self.model, name)
            if kept not in taken:
                tensor = self.take(kept)
                is_parameter = owner._parameters.get(attribute) is not None
                taken[kept] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            setattr(owner, attribute, taken[kept])
        if self.device.type != "cpu":
            self.file.release(names)

    def finish(self) -> None:
        for name, kind in self.description.computed.items():
            owner, attribute = _owner(self.model, name)
            setattr(owner, attribute, getattr(owner, attribute).to(getattr(torch, kind)))
        self.model.config.dtype = self.dtype
        self.model.requires_grad_(False)
        self.model.eval().to(self.device)

    def take(self, name: str) -> Tensor:
        """The tensor on the device: on a CPU in the mapping, elsewhere a copy."""
        return self.file.tensor(name).to(self.device)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the tensor's attribute there."""
    prefix, _, attribute = name.rpartition(".")
    return model.get_submodule(prefix), attribute
