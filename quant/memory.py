"""How much memory a cell of the sweep takes: foretold from the config alone, and as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from quant.bytes import dense_bytes, layer_slots
from quant.spec import CHANNEL, QuantSpec
from quant.targets import find_targets, meta_model

# A process with torch, transformers and Ray imported, before it holds a model: measured with the
# locked versions, 0.45 to 0.6 GB.
PROCESS = 600_000_000
CHUNK_TOKENS = 256  # of logits at a time, as in `quant.evaluate.evaluate`
CHUNK_TENSORS = 7  # float32 tensors [chunk, vocab] at once: logits, log-probs and terms, two models
TRAINING_TOKENS = 4096  # of a forward pass with gradients, as in recovery
LAYER_TENSORS = 8  # tensors [batch, seq, hidden] at once in a block, besides its MLP's two


@dataclass(frozen=True)
class Forecast:
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


def cell_memory(
    config: PreTrainedConfig | PreTrainedModel,
    spec: QuantSpec | None,
    batch_sequences: int,
    sequence_length: int,
    layers: Mapping[str, QuantSpec | None] | None = None,
    cuda: bool = False,
    training: bool = False,
    tasks: bool = False,
) -> Forecast:
    """What quantizing and evaluating a model takes; spec None: evaluating it in 16 bits.

    The codes and, for the evaluation, the dequantized weights in 16 bits; what is not quantized;
    the largest weight in float32 several times while it is quantized; activations of a batch;
    chunks of logits. training: recovery keeps the activations of all blocks. tasks:
    benchmark tasks hold the logits of a batch whole, as long as the sequences here.
    Raises ValueError for what `find_targets` refuses.
    """
    model = meta_model(config)
    text = model.config.get_text_config()
    tokens = batch_sequences * sequence_length
    if training:
        tokens = max(TRAINING_TOKENS, sequence_length)
    weights = dense_bytes(model)
    codes, largest = 0, 0
    if spec is not None:
        for target in find_targets(model, spec, layers).layers.values():
            size = target.columns if target.spec.group_size == CHANNEL else target.spec.group_size
            slots = layer_slots(target.rows, target.columns, target.spec.bits, int(size))
            codes += sum(slot.bytes for slot in slots.values())
            largest = max(largest, target.weights)
    hidden = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    heads = getattr(text, "num_attention_heads", 1)
    block = tokens * (LAYER_TENSORS * hidden + 3 * inner) * 2
    # Packed documents have a mask, and with one the scores of a batch are made on a CPU.
    scores = 0 if cuda else batch_sequences * heads * sequence_length**2 * 2
    activations = block + scores
    if training:
        activations *= max(1, getattr(text, "num_hidden_layers", 1))
    parts: dict[str, int] = {
        "16-bit weights": weights if spec is not None or cuda else 0,
        "codes": codes,
    }
    quantizing = {"quantizing a layer": 12 * largest}
    evaluating = {
        "activations": activations,
        "logits": (CHUNK_TENSORS * CHUNK_TOKENS * 4 + 6 * tokens * tasks) * text.vocab_size,
    }
    # Quantizing is over when the evaluation begins: the larger of the two counts.
    later = sum(evaluating.values()) >= sum(quantizing.values())
    parts |= evaluating if later else quantizing
    if training:
        parts["gradients"] = 4 * largest * 4
    parts = {name: size for name, size in parts.items() if size}
    total = sum(parts.values())
    if cuda:
        return Forecast(PROCESS, weights, total, parts)
    parts = {"process": PROCESS, **parts}
    return Forecast(PROCESS + total, weights, 0, parts)


class Peak:
    """The most memory that this process, or the GPU, held within a block.

    bytes: resident memory of the process at its highest, mapped files included, or what torch had
    allocated on the device; None where the system does not tell.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.bytes: int | None = None
        self._resets = False

    def __enter__(self) -> Peak:
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # needs Linux; a container may refuse it
                Path("/proc/self/clear_refs").write_text("5")  # proc(5): reset the high-water mark
                self._resets = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.startswith("cuda"):
            self.bytes = torch.cuda.max_memory_allocated()
            return
        if not self._resets:  # the mark would be of all that the process ever did
            return
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            line = next(line for line in lines if line.startswith("VmHWM:"))
            self.bytes = int(line.split()[1]) * 1024
