"""The head of a model by itself: a model of which nothing else is in memory.

The head is every stored tensor that lies outside of the model's base: `lm_head.weight`, a bias.
Where it is tied to the embeddings it is their table.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_outputs as general_outputs
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from cluster.storage.strict_json import read_object, shown
from quant.artifact.meta_model import hollow_model
from quant.artifact.safetensors_file import MappedTensors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def head_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The stored tensors outside of the model's base, by name."""
    prefix = f"{model.base_model_prefix}."
    tensors = model.state_dict(keep_vars=True)
    return {name: tensors[name] for name in tensors if not name.startswith(prefix)}


def head_hash(head: dict[str, Tensor]) -> str:
    """blake2b-128, in hex, of names, dtypes, shapes and values."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(head.items()):
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        state.update(flat.numpy().data)
    return state.hexdigest()


def model_with_head(
    folder: Path, wanted: dict[str, Any], device: torch.device | str
) -> PreTrainedModel | None:
    """The model of a Hugging Face folder with nothing but its head in memory, its base hollow.

    wanted: its model_class, model_dtype, head (names of tensors) and head_hash. None when the
    folder's model is another one.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    dtype = getattr(torch, str(wanted["model_dtype"]))
    model = hollow_model(config).to(dtype).eval().requires_grad_(False)
    if type(model).__name__ != wanted["model_class"]:
        return None
    if sorted(head_tensors(model)) != wanted["head"]:
        return None
    head = _mapped_head(model, folder, dtype)
    if head is None or head_hash(head) != wanted["head_hash"]:
        # Names in the files may not be the model's own: transformers knows how to read them.
        head = {
            name: tensor.clone()
            for name, tensor in head_tensors(whole_model(folder, dtype)).items()
        }
        if head_hash(head) != wanted["head_hash"]:
            return None
    getattr(model, model.base_model_prefix).to("meta")  # norms and tables, which are not hollow
    for name, tensor in head.items():
        _put(model, name, tensor.to(device))
    return model


def whole_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a folder, in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    return model.requires_grad_(False).eval()


def output_type(base: nn.Module, name: str) -> type:
    """The class of a base's output, which transformers or the base's own file defines.

    Raises ValueError when there is no such class of outputs.
    """
    for module in (sys.modules[type(base).__module__], general_outputs):
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, ModelOutput):
            return found
    raise ValueError(f"{type(base).__name__} has no output class {shown(name)} in transformers")


def _mapped_head(
    hollow: PreTrainedModel, folder: Path, dtype: torch.dtype
) -> dict[str, Tensor] | None:
    """The head's tensors from the weights' files, no others touched; None when not found there."""
    tensors = hollow.state_dict(keep_vars=True)
    prefix = f"{hollow.base_model_prefix}."
    found = {}
    try:
        files = _weight_files(folder)
        for name, tensor in head_tensors(hollow).items():
            # A tied tensor is stored under one of its names; a base saved alone has no prefix.
            names = [name, *(other for other in tensors if tensors[other] is tensor)]
            names += [other.removeprefix(prefix) for other in names]
            stored = next((other for other in names if other in files), None)
            if stored is None:
                return None
            # A copy lies where a tensor of a live model would: kernels round by alignment.
            value = MappedTensors(files[stored]).tensor(stored).clone()
            found[name] = value.to(dtype) if value.is_floating_point() else value
    except ValueError:  # stored in a way that transformers may still read
        return None
    return found


def _weight_files(folder: Path) -> dict[str, Path]:
    """Which file of a model's folder holds a tensor, by the tensor's name."""
    if (folder / INDEX).is_file():
        parts = read_object(folder / INDEX).get("weight_map", {})
        return {name: folder / str(part) for name, part in parts.items()}
    path = folder / SINGLE
    return dict.fromkeys(MappedTensors(path).slots, path) if path.is_file() else {}


def _put(model: PreTrainedModel, name: str, tensor: Tensor) -> None:
    """Replace a parameter or a buffer by a tensor."""
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[last] = tensor
