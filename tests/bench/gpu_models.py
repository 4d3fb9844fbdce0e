"""Models of known shapes with random weights, in 16 bits or in codes, made where they are to run.

Nothing is quantized: codes are drawn, which no speed depends on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quant.codes import Codes
from quant.layers.linear import QuantLinear, quant_linears

DEVIATION = 0.02  # of all weights

# width, MLP width, layers, heads, key-value heads, vocabulary
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 256),
    "1.1b": (2048, 5632, 22, 32, 4, 32_000),  # TinyLlama-1.1B
    "8b": (4096, 14_336, 32, 32, 8, 128_256),  # Llama-3.1-8B
}


@dataclass(frozen=True)
class Case:
    """How the linear layers are kept; group_size 0: one group per row."""

    bits: int
    group_size: int
    head: bool = False
    activations: str | None = None


CASES = {
    "4bit": Case(4, 64),
    "4bit_head": Case(4, 64, head=True),
    "8bit": Case(8, 64),
    "int8_dynamic": Case(8, 0, activations="int8"),
}


def config_of(shape: str, layers: int | None = None) -> LlamaConfig:
    """A Llama of that shape; `layers`: with so many instead."""
    width, inner, depth, heads, kv_heads, vocab = SHAPES[shape]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def make_model(config: LlamaConfig, case: Case | None, device: torch.device) -> Any:
    """The model in bfloat16 with random weights; `case`: its linear layers with random codes."""
    drawn = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and case and (case.head or name != "lm_head"):
            codes = random_codes(module.out_features, module.in_features, case, drawn)
            model.set_submodule(name, quantized(codes, case))
            continue
        for kind, parameter in list(module.named_parameters(recurse=False)):
            weight = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
            if weight.dim() > 1:
                weight.normal_(0, DEVIATION, generator=drawn)
            setattr(module, kind, nn.Parameter(weight, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return model.eval()


def random_codes(rows: int, columns: int, case: Case, drawn: torch.Generator) -> Codes:
    """Codes, scales and zero points of weights with about `DEVIATION`."""
    device, highest = drawn.device, 2**case.bits - 1
    groups = columns // (case.group_size or columns)

    def around(value: float, spread: float) -> Tensor:
        noise = torch.rand(rows, groups, generator=drawn, device=device) - 0.5
        return (value + spread * noise).half()

    symmetric = case.activations is not None
    codes = torch.randint(
        int(symmetric), highest + 1, (rows, columns), generator=drawn, device=device
    )
    scale = DEVIATION / (0.29 * highest)  # the deviation of a uniform variable on [0, 1] is .29
    middle = (highest + symmetric) / 2
    zero = around(middle, 0.0 if symmetric else 0.1 * highest)
    return Codes(codes.to(torch.uint8), around(scale, scale), zero, case.bits)


def quantized(codes: Codes, case: Case) -> QuantLinear:
    """A layer of these codes."""
    if case.activations is None:
        return QuantLinear.from_codes(codes)
    return QuantLinear.from_codes(codes, activations=case.activations)


@torch.no_grad()
def disagreement(model: nn.Module, outputs: dict[str, list[Tensor]] | None = None) -> Any:
    """Outputs of the first quantized layer of each shape for 1, 5 and 100 rows of noise; given
    those from before, the largest relative difference (Frobenius norm) of one from the other."""
    found: dict[str, list[Tensor]] = {}
    seen = set()
    for name, layer in quant_linears(model).items():
        if (layer.rows, layer.columns) in seen:
            continue
        seen.add((layer.rows, layer.columns))
        device = next(iter(layer.stored().values())).device
        noise = torch.Generator(device).manual_seed(1)
        found[name] = [
            layer(torch.randn(n, layer.columns, generator=noise, device=device).bfloat16()).float()
            for n in (1, 5, 100)
        ]
    if outputs is None:
        return found
    return max(
        float((ours - other).norm() / other.norm())
        for name, tensors in found.items()
        for ours, other in zip(tensors, outputs[name], strict=True)
    )
