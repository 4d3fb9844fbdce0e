"""How much memory a cell of the sweep takes, as arithmetic on a model's sizes; nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# A process with torch, transformers and Ray imported, before it holds a model: measured with the
# locked versions, 0.45 to 0.6 GB.
PROCESS = 600_000_000
CHUNK_TOKENS = 256  # of logits at a time, as in `quant.evaluation.evaluate.evaluate`
CHUNK_TENSORS = 7  # float32 tensors [chunk, vocab] at once: logits, log-probs and terms, two models
TRAINING_TOKENS = 4096  # of a forward pass with gradients, as in recovery
LAYER_TENSORS = 8  # tensors [batch, seq, hidden] at once in a block, besides its MLP's two


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a cell takes at its peak.

    host: of its process, without the pages of the 16-bit weights' file, which processes share and
    the system takes back when it needs them. mapped: those. device: of the GPU, 0 without one.
    parts: what the larger of host and device is made of, in words.
    """

    host: int
    mapped: int
    device: int
    parts: Mapping[str, int]

    def __str__(self) -> str:
        told = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.parts.items())
        return f"{sum(self.parts.values()) / 1e9:.2f} GB ({told})"


@dataclass(frozen=True)
class Sizes:
    """A model as far as its memory goes: elements, and bytes of the whole in 16 bits (`weights`).

    inner: of the MLP's states of a token.
    """

    weights: int
    hidden: int
    inner: int
    heads: int
    layers: int
    vocab: int


def estimate_memory(
    sizes: Sizes,
    codes: int | None,
    largest: int,
    batch_sequences: int,
    sequence_length: int,
    cuda: bool = False,
    training: bool = False,
    tasks: bool = False,
) -> MemoryEstimate:
    """What quantizing and evaluating a model takes: see `quant.evaluation.memory.cell_memory`.

    codes: bytes of codes, scales and zeros of all layers; None: the model stays in 16 bits.
    largest: weights of the largest layer that is quantized.
    """
    tokens = batch_sequences * sequence_length
    if training:
        tokens = max(TRAINING_TOKENS, sequence_length)
    block = tokens * (LAYER_TENSORS * sizes.hidden + 3 * sizes.inner) * 2
    # Packed documents have a mask, and with one the scores of a batch are made on a CPU.
    scores = 0 if cuda else batch_sequences * sizes.heads * sequence_length**2 * 2
    activations = block + scores
    if training:
        activations *= max(1, sizes.layers)
    parts: dict[str, int] = {
        "16-bit weights": sizes.weights if codes is not None or cuda else 0,
        "codes": codes or 0,
    }
    quantizing = {"quantizing a layer": 12 * largest}
    evaluating = {
        "activations": activations,
        "logits": (CHUNK_TENSORS * CHUNK_TOKENS * 4 + 6 * tokens * tasks) * sizes.vocab,
    }
    # Quantizing is over when the evaluation begins: the larger of the two counts.
    later = sum(evaluating.values()) >= sum(quantizing.values())
    parts |= evaluating if later else quantizing
    if training:
        parts["gradients"] = 4 * largest * 4
    parts = {name: size for name, size in parts.items() if size}
    total = sum(parts.values())
    if cuda:
        return MemoryEstimate(PROCESS, sizes.weights, total, parts)
    parts = {"process": PROCESS, **parts}
    return MemoryEstimate(PROCESS + total, sizes.weights, 0, parts)
