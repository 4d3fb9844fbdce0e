"""A checkpoint streamed into a model, piece by piece, so that no rank ever holds all of it.

`from_pretrained` under ZeRO-3 reads the whole checkpoint into the memory of one rank first, and
does not say which of its tensors found no place. Here the model is built without memory, and each
piece is handed over as soon as it is there. What a tensor of the checkpoint is called in the model,
and how it is put together, is left to transformers' own loader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Rows of two tied tensors that are compared at a time.
COMPARED_ROWS = 4096


class Misfit(ValueError):
    """A checkpoint that does not hold exactly the weights of its model."""


def stream_model(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    take: Callable[[list[Any]], None],
) -> PreTrainedModel:
    """The causal language model of a folder on `device`, its weights handed to `take` as they come.

    `take` gets the parameters that have just been filled; what it leaves of them stays. Between two
    calls at most as much is in memory as the largest parameter has, and what it is made of.
    Buffers that no checkpoint stores are computed as `from_pretrained` does. Raises Misfit, one
    line, unless every weight is in the checkpoint, fits, and nothing is left over.
    """
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None) is not None:
        raise Misfit(f"{folder}: a quantized checkpoint cannot be sharded; use sharding: none")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    with ExitStack() as files:
        found = _slices(folder, files)
        loader = _Loader(folder, model, dtype, device, found)
        for piece in loader.pieces():
            take(loader.load(piece))
    loader.finish()
    return model.eval()


def _slices(folder: Path, files: ExitStack) -> dict[str, Any]:
    """The tensors of a checkpoint by name; nothing is read yet."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        raise Misfit(f"{folder}: holds neither model.safetensors nor {index.name}")
    result = {}
    for name in names:
        if not (folder / name).is_file():
            raise Misfit(f"{folder}: {index.name} names {name}, which is not there")
        # Pages of a memory map would count as this process's memory until the file is closed.
        file = files.enter_context(safe_open(folder / name, framework="pt", backend="pread"))
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            result[key] = file.get_slice(key)
    return result


class _Loader:
    """Loads pieces of a checkpoint into a model, and keeps the accounts."""

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        dtype: torch.dtype,
        device: torch.device,
        found: dict,
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        self.folder, self.model, self.device, self.found = folder, model, device, found
        mapping: Any = get_model_conversion_mapping(model)  # wider than what takes it below
        self.mapping = mapping
        self.settings = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=mapping,
        )
        self.unexpected: set[str] = set()
        self.loaded: set[str] = set()

    def pieces(self) -> Iterator[list[str]]:
        """Names in the checkpoint, together as far as they make one parameter or few small ones."""
        shapes = self.model.state_dict()
        targets = self._targets(shapes)
        for name in self._second_of_tied(targets):
            del targets[name]

        def size(target: str) -> int:
            return shapes[target].numel() if target in shapes else 0

        space = max(map(size, targets), default=0)
        piece: list[str] = []
        taken = 0
        for target, names in targets.items():
            if piece and taken + size(target) > space:
                yield piece
                piece, taken = [], 0
            piece += names
            taken += size(target)
        if piece:
            yield piece

    def _targets(self, shapes: dict) -> dict[str, list[str]]:
        """The checkpoint's names by the name in the model that they are for, in natural order."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = deepcopy(self.mapping)  # some entries remember what they have seen
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix = self.model.base_model_prefix
        result: dict[str, list[str]] = {}
        for name in sorted(self.found, key=dot_natural_key):
            target, _ = rename_source_key(name, renamings, converters, prefix, shapes)
            result.setdefault(target, []).append(name)
        return result

    def _second_of_tied(self, targets: dict[str, list[str]]) -> list[str]:
        """Tied weights that the checkpoint holds twice: the one that need not be read.

        As transformers does it, the two stay apart where they differ.
        """
        result = []
        for second, first in list(self.model.all_tied_weights_keys.items()):
            if first not in targets or second not in targets:
                continue
            a, b = ([self.found[name] for name in targets[key]] for key in (first, second))
            if len(a) == len(b) == 1 and _equal(a[0], b[0]):
                result.append(second)
            else:
                del self.model.all_tied_weights_keys[second]
        return result

    def load(self, names: list[str]) -> list[Any]:
        """Reads these tensors of the checkpoint; returns the parameters that they make."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        before = dict(self._parameters())
        with _no_bars():
            info, _ = convert_and_load_state_dict_in_model(
                self.model, {name: self.found[name] for name in names}, self.settings
            )
        for target, error in info.conversion_errors.items():
            raise Misfit(f"{self.folder}: {target} cannot be made: {error.splitlines()[-1]}")
        for target, got, wanted in info.mismatched_keys:
            raise Misfit(f"{self.folder}: {target} is {tuple(got)}, the model has {tuple(wanted)}")
        self.unexpected |= info.unexpected_keys
        made = []
        for target, parameter in self._parameters():
            if parameter is not before[target]:
                self.loaded.add(target)
                made.append(parameter.requires_grad_(False))
        return made

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters; tied ones under each of their names."""
        return self.model.named_parameters(remove_duplicate=False)

    def finish(self) -> None:
        """Ties what is tied, computes what is not stored, and looks for what is missing."""
        from transformers.utils.loading_report import LoadStateDictInfo

        model: Any = self.model
        pairs = list(model.all_tied_weights_keys.items())
        for second, first in pairs * 2:  # twice: the one that is there may come last
            for there, absent in ((first, second), (second, first)):
                if there in self.loaded and absent not in self.loaded:
                    owner, _, name = absent.rpartition(".")
                    setattr(model.get_submodule(owner), name, model.get_parameter(there))
                    self.loaded.add(absent)
        model._move_missing_keys_from_meta_to_device(set(), {"": self.device}, None, None)
        missing = [name for name, value in self._parameters() if value.is_meta]
        missing += [name for name, value in model.named_buffers() if value.is_meta]
        info = LoadStateDictInfo(set(), self.unexpected, set(), [], {}, set())
        model._adjust_missing_and_unexpected_keys(info)
        for kind, names in (("missing", missing), ("left over", sorted(info.unexpected_keys))):
            if names:
                raise Misfit(
                    f"{self.folder}: the weights do not fit the model: {kind} {names[:3]} "
                    f"({len(names)} in all)"
                )
        model._initialize_missing_keys(is_quantized=False)


def _equal(a: Any, b: Any) -> bool:  # noqa: ANN401
    """Whether two tensors of a checkpoint are equal, compared by rows."""
    if a.get_shape() != b.get_shape() or a.get_dtype() != b.get_dtype():
        return False
    rows = a.get_shape()[0]
    spans = [slice(i, min(i + COMPARED_ROWS, rows)) for i in range(0, rows, COMPARED_ROWS)]
    return all(torch.equal(a[span], b[span]) for span in spans)


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers' loader draws a progress bar for every piece."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
