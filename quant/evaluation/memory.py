"""How much memory a cell of the sweep takes: foretold from the config alone, and as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from quant.artifact.sizes import dense_bytes, layer_slots
from quant.evaluation.memory_forecast import PROCESS, MemoryEstimate, Sizes, estimate_memory
from quant.quant_spec import CHANNEL, QuantSpec
from quant.targets import find_targets
from trainer.models.load import meta_model

__all__ = ["PROCESS", "MemoryEstimate", "Peak", "cell_memory"]


def cell_memory(
    config: PreTrainedConfig | PreTrainedModel,
    spec: QuantSpec | None,
    batch_sequences: int,
    sequence_length: int,
    layers: Mapping[str, QuantSpec | None] | None = None,
    cuda: bool = False,
    training: bool = False,
    tasks: bool = False,
) -> MemoryEstimate:
    """What quantizing and evaluating a model takes; spec None: evaluating it in 16 bits.

    The codes and, for the evaluation, the dequantized weights in 16 bits; what is not quantized;
    the largest weight in float32 several times while it is quantized; activations of a batch;
    chunks of logits. training: recovery keeps the activations of all blocks. tasks:
    benchmark tasks hold the logits of a batch whole, as long as the sequences here.
    Raises ValueError for what `find_targets` refuses.
    """
    model = meta_model(config)
    text = model.config.get_text_config()
    codes, largest = 0, 0
    if spec is not None:
        for target in find_targets(model, spec, layers).layers.values():
            size = target.columns if target.spec.group_size == CHANNEL else target.spec.group_size
            slots = layer_slots(target.rows, target.columns, target.spec.bits, int(size))
            codes += sum(slot.bytes for slot in slots.values())
            largest = max(largest, target.weights)
    sizes = Sizes(
        weights=dense_bytes(model),
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=getattr(text, "num_attention_heads", 1),
        layers=getattr(text, "num_hidden_layers", 1),
        vocab=text.vocab_size,
    )
    return estimate_memory(
        sizes,
        None if spec is None else codes,
        largest,
        batch_sequences,
        sequence_length,
        cuda=cuda,
        training=training,
        tasks=tasks,
    )


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
