"""The teacher once more over a few sequences, in one process: what records are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.corpus.corpus import Part
from trainer.losses.fused_linear import Head, chunk_tokens, head_of
from trainer.models.head import check_head, last_hidden
from trainer.models.load import count_parameters, load_model, meta_model, read_config
from trainer.worker import torch_dtype

# Share of the free memory that the weights may take.
FITS = 0.7
# Longer sequences make plain attention's matrix of all pairs too large.
PLAIN_ATTENTION = 4096


@dataclass(frozen=True)
class Forward:
    """One way of running the teacher: final hidden states on the CPU, [seq, hidden], by sequence
    key, and the head that makes logits of them."""

    head: Head
    hidden: dict[bytes, Tensor] = field(default_factory=dict)

    def logits(self, key: bytes) -> Iterator[tuple[int, Tensor]]:
        """(first position, float32 logits [positions, vocab]) of a sequence, chunk by chunk."""
        states, head = self.hidden[key], self.head
        step = chunk_tokens(head.weight.shape[0])
        for start in range(0, len(states), step):
            rows = states[start : start + step].to(head.weight.device)
            yield start, head.logits(rows)[:, : head.vocab]


@dataclass(frozen=True)
class Reruns:
    """The teacher as it was captured; in another batch shape and order and with plain attention,
    which is as much as other hardware would change; and in float32, where it was captured in
    bfloat16 and float32 fits into memory."""

    captured: Forward
    reshaped: Forward
    float32: Forward | None


def rerun(
    folder: Path,
    dtype: str,
    vocab: int,
    parts: Sequence[tuple[Part, Sequence[int]]],
    batch: Callable[[int, str], int],
    say: Callable[[str], None],
) -> Reruns:
    """Runs the teacher of a model folder over sequences (part, their numbers).

    batch: sequences per forward pass of a capture, of the teacher's parameters and the device.
    Raises ValueError, one line, if the model
    cannot be loaded, or does not fit the memory of this machine.
    """
    parameters = count_parameters(meta_model(read_config(folder)))
    size = parameters * torch_dtype(dtype).itemsize
    device, free = _device(size)
    if size > FITS * free:
        raise ValueError(
            f"teacher.model: {size / 1e9:.1f} GB of weights do not fit this machine "
            f"({free / 1e9:.1f} GB free); verify where they fit, or give the cache instead of the "
            "spec to verify its files alone"
        )
    say(f"running the teacher over {sum(len(numbers) for _, numbers in parts)} sequences")
    model = _load(folder, dtype, vocab, device)
    sequences = batch(parameters, device.type)
    captured = _forward(model, vocab, parts, sequences)
    if max(part.batch([]).input_ids.shape[1] for part, _ in parts) <= PLAIN_ATTENTION:
        with suppress(ValueError):  # not every model has it
            model.set_attn_implementation("eager")
    turned = [(part, numbers[::-1]) for part, numbers in parts]
    reshaped = _forward(model, vocab, turned, 1 if sequences > 1 else 2)
    del model
    if dtype == "float32" or parameters * 4 > FITS * _free(device):
        return Reruns(captured, reshaped, None)
    say("running the teacher in float32")
    exact = _forward(_load(folder, "float32", vocab, device), vocab, parts, sequences)
    return Reruns(captured, reshaped, exact)


def _load(folder: Path, dtype: str, vocab: int, device: torch.device) -> Any:
    model = load_model(folder, torch_dtype(dtype), device).eval()
    check_head(model, vocab)
    return model


def _forward(
    model: Any, vocab: int, parts: Sequence[tuple[Part, Sequence[int]]], batch: int
) -> Forward:
    head = head_of(model, vocab)
    # A copy: the rest of the model is let go.
    copied = replace(
        head,
        weight=head.weight.detach().clone(),
        bias=None if head.bias is None else head.bias.detach().clone(),
    )
    made = Forward(copied)
    device = head.weight.device
    for part, chosen in parts:
        for asked in _batches(part, chosen, batch):
            # As in a capture, where every forward pass has a full batch; rounding depends on it.
            rows = part.batch(np.resize(asked, batch))
            with torch.inference_mode():
                states = last_hidden(
                    model,
                    torch.from_numpy(rows.input_ids).to(device),
                    torch.from_numpy(rows.position_ids).to(device),
                ).reshape(*rows.input_ids.shape, -1)
            for i in range(len(asked)):
                made.hidden[rows.keys[i].tobytes()] = states[i].cpu()
    return made


def _batches(part: Part, chosen: Sequence[int], batch: int) -> Iterator[NDArray[np.int64]]:
    """Sequences for each forward pass: with and without several documents apart, as in a capture,
    since these have other attention masks."""
    numbers = np.asarray(chosen, dtype=np.int64)
    mixed = part.mixed(numbers)
    for alike in (numbers[mixed], numbers[~mixed]):
        for start in range(0, len(alike), batch):
            yield alike[start : start + batch]


def _device(size: int) -> tuple[torch.device, float]:
    """Where the teacher runs, and the bytes that are free there."""
    if torch.cuda.is_available() and size <= FITS * _free(torch.device("cuda")):
        device = torch.device("cuda")
    else:
        device = torch.device("cpu")
    return device, _free(device)


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    import psutil

    return float(psutil.virtual_memory().available)
