"""Writes the folder of a Hugging Face export: config, weights, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from quant.artifact.atomic_folder import whole_folder
from quant.artifact.sizes import stored_tensors
from quant.export.hf.compressed_tensors import Packed, quantization_config
from trainer.corpus.tokenizer import copy_tokenizer, has_tokenizer

SINGLE = "model.safetensors"


def check_folders(source: Path, out: Path) -> None:
    """Raise ValueError unless `source` is a folder, and `out` is new or an empty one."""
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; name the one with the tokenizer's files")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder to export into")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; export into a new folder")


def write_folder(
    stock: PreTrainedModel,
    packed: Mapping[str, Packed],
    linear: list[str],
    dequantize: bool,
    source: Path,
    out: Path,
    shard_bytes: int,
    notes: list[str],
) -> tuple[dict[str, int], dict[str, str]]:
    """Write `out` and return (bytes by file name, stored type by tensor name).

    stock: the unquantized model; packed: its layers that are stored otherwise; linear: its
    `torch.nn.Linear` layers by name. Appends to `notes` when `source` has no tokenizer.
    """
    with whole_folder(out, lambda path: False, lambda path: ()) as folder:
        stock.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = [type(stock).__name__]
        config["dtype"] = str(stock.dtype).removeprefix("torch.")
        if packed:
            config["quantization_config"] = quantization_config(packed, linear, dequantize)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if stock.generation_config is not None:
            stock.generation_config.save_pretrained(folder)
        tensors = _write_weights(stock, packed, folder, shard_bytes)
        copy_tokenizer(source, folder)
        if not has_tokenizer(folder):
            notes.append(f"{source} has no tokenizer files: add those of the model.")
        files = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    return files, tensors


def _write_weights(
    stock: PreTrainedModel, packed: Mapping[str, Packed], folder: Path, shard_bytes: int
) -> dict[str, str]:
    """Write the safetensors files, one shard in memory at a time; stored type by tensor name."""
    types: dict[str, str] = {}
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def close() -> None:
        save_file(shard, str(folder / f"{len(shards)}.shard"), metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor, kind in _stored(stock, packed):
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > shard_bytes:
            close()
        shard[name] = tensor
        types[name] = kind
        total += tensor.nbytes
    close()
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        found = {name: file for file, held in zip(names, shards, strict=True) for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(found.items()))}
        (folder / f"{SINGLE}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for number, name in enumerate(names):
        (folder / f"{number}.shard").rename(folder / name)
        shutil.copymode(folder / "config.json", folder / name)  # safetensors' are its owner's alone
    return types


def _stored(
    stock: PreTrainedModel, packed: Mapping[str, Packed]
) -> Iterator[tuple[str, Tensor, str]]:
    """Every tensor of the files: its name, itself, and its type in words."""
    kept, _ = stored_tensors(stock)
    for name, tensor in kept.items():
        owner, _, last = name.rpartition(".")
        if owner in packed and last == "weight":
            layer = packed[owner]
            for part, held in layer.tensors().items():
                codes = part in ("weight", "weight_packed")
                yield f"{owner}.{part}", held, str(layer.scheme) if codes else _kind(held)
        else:  # a copy: tensors that share memory cannot be in one file
            yield name, tensor.cpu().clone().contiguous(), _kind(tensor)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
