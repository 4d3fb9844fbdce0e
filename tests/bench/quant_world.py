"""What the quantization benches measure on: TinyLlama-1.1B's shape with random weights, on disk in
16 bits and quantized."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quant.artifact import load_quantized
from quant.quant_spec import QuantSpec
from quant.quantize import quantize

PROMPTS = (512, 2048)
DECODE_PROMPT = 32
# Embeddings and head are quantized too: what a small model's folder is made of.
CELLS = {
    "4-bit": QuantSpec(4, 64, embeddings=True, head=True),
    "8-bit": QuantSpec(8, 64, embeddings=True, head=True),
    "2-bit": QuantSpec(2, 64, embeddings=True, head=True),
    "int8-dynamic": QuantSpec(8, "channel", "int8-dynamic", embeddings=True, head=True),
}
BASE = "bf16"


def shape(layers: int = 22) -> LlamaConfig:
    """TinyLlama-1.1B's; fewer layers to try the bench out."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32_000,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )


def write_base(folder: Path, layers: int) -> None:
    """The model in bfloat16 with normal weights of deviation .02, as a Hugging Face folder."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(shape(layers), dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder)


def write_cell(base: Path, folder: Path, spec: QuantSpec) -> dict[str, Any]:
    """Quantizes and saves; returns seconds of either and the number of weights in codes."""
    model = load_base(base)
    began = time.perf_counter()
    weights = 0

    def progress(done: int, total: int) -> None:
        nonlocal weights
        weights = total

    model = quantize(model, spec, progress=progress)
    quantized = time.perf_counter()
    model.save_pretrained(folder)
    return {
        "quantize_s": quantized - began,
        "save_s": time.perf_counter() - quantized,
        "weights": weights,
    }


def load_base(folder: Path) -> Any:
    """The 16-bit model."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    return model.requires_grad_(False).eval()


def load(name: str, folder: Path) -> Any:
    """The model of that name below `folder`, with its fastest kernels."""
    return load_base(folder / name) if name == BASE else load_quantized(folder / name)


def facts(folder: Path, name: str) -> dict[str, Any]:
    """Written beside a model by `write_cell`'s caller, so that a second part need not repeat it."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}
