"""A small whole artifact to break, and the claim that a broken one is refused well."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from quant.artifact import load_quantized, save_quantized
from quant.bytes import stored_tensors
from quant.quantize import quantize
from quant.spec import QuantSpec
from tests.unit.quant.conftest import tiny_llama

WEIGHTS, CONFIG, DESCRIPTION = "quantized.safetensors", "config.json", "quant.json"
FILES = (WEIGHTS, CONFIG, DESCRIPTION, "generation_config.json")
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
PEAK = Path("/proc/self/clear_refs")  # writing 5 sets the peak of resident memory back
MIB = 1 << 20


def make_sound(folder: Path, embeddings: bool = True) -> Path:
    """One layer with a bias on q; embeddings and head tied, in one set of codes or in 16 bits."""
    spec = QuantSpec(4, 32, embeddings=embeddings, head=embeddings)
    model = tiny_llama(tied=True, num_hidden_layers=1, attention_bias=True)
    return save_quantized(
        quantize(model, spec, dtype=torch.bfloat16), folder, spec, {"note": "kept"}
    )


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """Write a safetensors file of this header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a JSON file; the edit changes the object or returns another."""
    found = json.loads(path.read_text())
    other = edit(found)
    path.write_text(json.dumps(found if other is None else other))


def refusal(folder: Path, load: Callable[[Path], Any] = load_quantized) -> str:
    """The one line that loading ends in, which names a file in the folder; without
    memory for what the file only claims, nor the time (the tests that use it have a limit)."""
    if os.access(PEAK, os.W_OK):
        PEAK.write_text("5")
    before = peak_bytes()
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert peak_bytes() - before < 96 * MIB
    line = str(caught.value)
    assert "\n" not in line and len(line) < len(str(folder)) + 500, line
    assert line.startswith(str(folder)), line
    return line.removeprefix(str(folder)).lstrip("/")


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def same_tensors(model: LlamaForCausalLM, tensors: dict[str, Tensor]) -> bool:
    """Whether the model's stored tensors are these, bit for bit."""
    kept, _ = stored_tensors(model)
    return set(kept) == set(tensors) and all(
        tensor.dtype == kept[name].dtype
        and tensor.shape == kept[name].shape
        and torch.equal(_raw(tensor), _raw(kept[name]))
        for name, tensor in tensors.items()
    )


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
