"""A 16-bit model's answers on a part, computed once and read by every cell.

Stored are the last hidden states at the counted positions, not logits, which would be `vocab /
hidden` times as large. A reader holds the head alone and applies it to a chunk of tokens at a time.

The head alone is loaded by `model_with_head`. It is every stored tensor that lies outside of the
model's base: `lm_head.weight`, a bias. Where it is tied to the embeddings it is their table.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers.modeling_outputs as general_outputs
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from cluster.storage.strict_json import broken, read_object, shown
from quant.artifact.atomic_folder import whole_folder
from quant.artifact.meta_model import hollow_model
from quant.artifact.safetensors_file import NAMES, MappedTensors
from quant.evaluation.batches import (
    Batch,
    CountedLogits,
    DataHash,
    HeadLogits,
    Sequences,
    batch_progress,
    inputs,
    place,
)

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


FORMAT = 1
HIDDEN, META = "hidden.safetensors", "meta.json"
HEADER = 256  # bytes, length included: hidden states start at a multiple of a cache line
AGAIN = "write the reference again"


@torch.inference_mode()
def write_reference(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    folder: str | Path,
    device: torch.device | str = "cpu",
    progress: Sequences | None = None,
) -> dict[str, Any]:
    """Run `model` over the batches and keep its last hidden states at their counted positions.

    Writes `hidden.safetensors` (one tensor `hidden`, `[tokens, hidden]` in the model's dtype, rows
    in the order of the batches; one batch in memory at a time) and `meta.json` into `folder`, both
    or neither; a reference that is there is replaced. Returns the meta. A model whose base cannot
    run by itself has no hidden states to keep: its meta says kind "inseparable", and readers run it
    (`open_reference`). `progress` is called with the sequences done, in fractions within a batch.
    Raises ValueError when no position counts or something else is in `folder`.
    """
    folder = Path(folder)
    runs: nn.Module = model  # transformers' own `to` has no types
    runs.to(device).eval()
    head = head_tensors(model)
    found: dict[str, Any] = {
        "format": FORMAT,
        "kind": "hidden",
        "tokens": 0,
        "hidden_size": None,
        "hidden_dtype": None,
        "output_class": None,
        "model_class": type(model).__name__,
        "model_dtype": _name(model.dtype),
        "head": sorted(head),
        "head_hash": head_hash(head),
    }
    data, tokens, hashes = DataHash(), [], []
    with (
        whole_folder(folder, lambda path: False, lambda path: (HIDDEN, META)) as partial,
        _rows(partial / HIDDEN) as append,
        batch_progress(progress, [model], forward=1.0) as meter,
    ):
        for batch in batches:
            ids, counted, _ = inputs(batch, device)
            meter.begin(len(ids))
            tokens.append(int(counted.sum()))
            hashes.append(data.add(batch))
            if found["kind"] == "inseparable":
                continue
            logits = CountedLogits(model, ids, place(batch.position_ids, device), counted)
            if logits.base is None or not head:
                found["kind"] = "inseparable"
                continue
            append(logits.rows)
            found["hidden_size"] = logits.rows.shape[1]
            found["hidden_dtype"] = _name(logits.rows.dtype)
            found["output_class"] = logits.output_type.__name__
        found |= {
            "tokens": sum(tokens),
            "sequences": sum(data.batch_sizes),
            "data_hash": data.hex,
            "batch_sizes": data.batch_sizes,
            "batch_tokens": tokens,
            "batch_hashes": hashes,
            "device": torch.device(device).type,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }
        if not found["tokens"]:
            raise ValueError("nothing to keep: no position of the sequences counts (loss_mask)")
        append(None)
        if found["kind"] == "inseparable":
            (partial / HIDDEN).unlink()
        _write(partial / META, json.dumps(found, indent=1).encode())
    return found


class StoredReference:
    """What `write_reference` kept, with the model's head: its logits, bit for bit.

    Bit for bit where the model would run the same way: on the same kind of machine, with the same
    batches. Only the head is in memory; hidden states are mapped, and copied batch by batch.
    """

    def __init__(
        self,
        folder: str | Path,
        model_folder: str | Path,
        device: torch.device | str = "cpu",
        vocab: int | None = None,
    ) -> None:
        """model_folder: of the model that the reference was made with; vocab: ids from there on are
        left out. Raises ValueError (one line) when the files are broken, the reference is of an
        inseparable model, or was made with another model."""
        self.folder = Path(folder)
        self.device, self.vocab = device, vocab
        self.meta = read_meta(folder)
        if self.meta["kind"] != "hidden":
            raise broken(
                self.folder / META,
                f"{self.meta['model_class']} has no base that runs by itself, so nothing is "
                "stored; run the model (open_reference does)",
            )
        self._file = MappedTensors(self.folder / HIDDEN)
        shape = (self.meta["tokens"], self.meta["hidden_size"])
        slot = self._file.slots.get("hidden")
        if slot is None or slot.shape != shape or _name(slot.dtype) != self.meta["hidden_dtype"]:
            raise broken(
                self._file.path,
                f"it is not the tensor hidden, {self.meta['hidden_dtype']} {list(shape)}, that "
                f"{META} tells of; {AGAIN}",
            )
        model = model_with_head(Path(model_folder), self.meta, device)
        if model is None:
            raise broken(
                self.folder,
                f"the reference was made with another model than the one in {model_folder} (a "
                f"{self.meta['model_class']}, or weights that differ); name that one, or {AGAIN}",
            )
        self._model = model
        self._base = getattr(model, model.base_model_prefix)
        self._output_type = output_type(self._base, str(self.meta["output_class"]))
        self._starts = [0]
        for tokens in self.meta["batch_tokens"]:
            self._starts.append(self._starts[-1] + tokens)

    def batch(self, index: int, data_hash: str) -> HeadLogits:
        """Logits of the counted positions of batch `index`, as `CountedLogits` gives them.

        data_hash: `DataHash` after this batch. Raises ValueError (one line) when the reference was
        made of other sequences, or of batches of other sizes.
        """
        hashes = self.meta["batch_hashes"]
        if index >= len(hashes) or hashes[index] != data_hash:
            raise self._other(f"batch {index} of the data is not the one it was made of")
        # A copy lies where a tensor of a live model would: kernels round by alignment.
        rows = self._file.tensor("hidden")[self._starts[index] : self._starts[index + 1]].clone()
        self._file.release(["hidden"])
        return HeadLogits(
            self._model, self._base, rows.to(self.device), self._output_type, self.vocab
        )

    def check_end(self, batches: int) -> None:
        """Raises ValueError (one line) unless that many batches are all that there are."""
        if batches != len(self.meta["batch_hashes"]):
            raise self._other(
                f"it has {len(self.meta['batch_hashes'])} batches, the data {batches}"
            )

    def _other(self, text: str) -> ValueError:
        return broken(
            self.folder,
            f"the reference does not belong to this data: {text}; evaluate the part that it was "
            f"made of, in batches of {shown(self.meta['batch_sizes'])}, or {AGAIN}",
        )


def open_reference(
    folder: str | Path,
    model_folder: str | Path,
    device: torch.device | str = "cpu",
    vocab: int | None = None,
) -> StoredReference | PreTrainedModel:
    """The stored reference, or for an inseparable model the model itself, loaded.

    Raises ValueError (one line) as `StoredReference` does.
    """
    meta = read_meta(folder)
    if meta["kind"] == "hidden":
        return StoredReference(folder, model_folder, device, vocab)
    model = whole_model(Path(model_folder), getattr(torch, str(meta["model_dtype"])))
    runs: nn.Module = model  # transformers' own `to` has no types
    runs.to(device)
    return model


def read_meta(folder: str | Path) -> dict[str, Any]:
    """The meta that `write_reference` wrote. Raises ValueError (one line) when it is not one."""
    path = Path(folder) / META
    meta = read_object(path)
    missing = [
        key
        for key in ("kind", "model_class", "model_dtype", "batch_hashes", "head")
        if key not in meta
    ]
    if meta.get("format") != FORMAT or missing:
        what = f"has no {missing[0]}" if missing else f"is of format {shown(meta.get('format'))}"
        raise broken(path, f"it {what}; must be a reference of format {FORMAT}; {AGAIN}")
    return meta


@contextmanager
def _rows(path: Path) -> Iterator[Any]:
    """A safetensors file with one tensor `hidden` that grows: how many rows, the end tells.

    Gives a function that appends rows `[tokens, hidden]`, or with None completes the file.
    """
    with path.open("xb") as file:
        file.write(bytes(HEADER))
        count, width, dtype = 0, 0, torch.float32

        def append(rows: Tensor | None) -> None:
            nonlocal count, width, dtype
            if rows is None:
                _complete(file, [count, width], dtype)
                return
            count, width, dtype = count + rows.shape[0], rows.shape[1], rows.dtype
            file.write(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

        yield append


def _complete(file: BinaryIO, shape: list[int], dtype: torch.dtype) -> None:
    size = shape[0] * shape[1] * dtype.itemsize
    entry = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [0, size]}
    header = {"__metadata__": {"format": "pt"}, "hidden": entry}
    file.seek(0)
    file.write((HEADER - 8).to_bytes(8, "little"))
    file.write(json.dumps(header, separators=(",", ":")).encode().ljust(HEADER - 8))
    file.flush()
    os.fsync(file.fileno())


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
