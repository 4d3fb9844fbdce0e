"""How well a model answers: one pass over token sequences, one plain dict back.

Position t is about the prediction of token t + 1; `loss_mask[t] = 1` says that it counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant.divergence import coarsened_kl, full_kl
from quant.logits import CountedLogits, place


class Batch(Protocol):
    """Token sequences (numpy): ids and positions int64 `[batch, seq]`, loss_mask float32."""

    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def position_ids(self) -> np.ndarray: ...
    @property
    def loss_mask(self) -> np.ndarray: ...


class TeacherRecords(Protocol):
    """A teacher's stored distributions of one batch (numpy), meaningful where loss_mask is 1.

    ids int32, logprobs float32 `[batch, seq, k]`; tail, entropy, true_logprob float32
    `[batch, seq]`; natural logs of the full softmax.
    """

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def logprobs(self) -> np.ndarray: ...
    @property
    def tail(self) -> np.ndarray: ...
    @property
    def entropy(self) -> np.ndarray: ...
    @property
    def true_logprob(self) -> np.ndarray: ...


# Columns: one float64 value per counted position, all columns of the same length.
Columns = dict[str, np.ndarray]
PER_SEQUENCE = ("nll", "correct", "kl_to_reference", "kl_to_teacher")


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    reference: PreTrainedModel | None = None,
    teacher_records: Iterable[TeacherRecords] | None = None,
    device: torch.device | str = "cpu",
    chunk_tokens: int = 256,
    vocab: int | None = None,
) -> dict[str, Any]:
    """Measure `model`, also against an unquantized `reference` and a teacher's records.

    Models are moved to `device`, put into eval mode, and run in the dtype they have; log-softmax
    and divergences are float32, sums float64. `teacher_records` is aligned with `batches`.
    `chunk_tokens` bounds memory: a few float32 tensors `[chunk_tokens, vocab]`. Ids from `vocab`
    on do not exist: rows that a head has beyond its tokenizer are left out, as in training.

    Returns: tokens (counted positions), nll (nats per token), perplexity, accuracy (next token);
    with a reference: kl_to_reference (mean KL(reference || model)), its _p99 and _max,
    top1_agreement, reference_accuracy, reference_perplexity; with records: kl_to_teacher
    (coarsened to the record, see `coarsened_kl`), teacher_top1_agreement, teacher_accuracy,
    teacher_perplexity; without either, those are None. `per_sequence` holds, for every sequence
    in order, the number of counted `tokens` and the sums of nll, correct and both divergences.

    Raises ValueError when no position counts or records and batches differ in shape or number,
    FloatingPointError when the model's loss is not finite.
    """
    modules: list[nn.Module] = [model] if reference is None else [model, reference]
    for module in modules:
        module.to(device).eval()
    columns: list[Columns] = []
    sequences = 0
    for batch, records in _aligned(batches, teacher_records):
        ids, counted, targets = _inputs(batch, device)
        positions = place(batch.position_ids, device)
        own = CountedLogits(model, ids, positions, counted)
        other = None if reference is None else CountedLogits(reference, ids, positions, counted)
        teacher = None if records is None else _teacher_columns(batch, records)
        sparse = () if records is None else _sparse(records, counted, device)
        rows = counted.nonzero()[:, 0]
        for first in range(0, len(own), chunk_tokens):
            last = min(first + chunk_tokens, len(own))
            part = _measure(
                own.chunk(first, last)[:, :vocab],
                None if other is None else other.chunk(first, last)[:, :vocab],
                targets[first:last],
                [tensor[first:last] for tensor in sparse],
            )
            part["sequence"] = rows[first:last] + sequences
            found = {name: tensor.double().cpu().numpy() for name, tensor in part.items()}
            if teacher is not None:
                found |= {name: values[first:last] for name, values in teacher.items()}
            columns.append(found)
        sequences += ids.shape[0]
    return _summary(_joined(columns), sequences)


def teacher_metrics(
    batches: Iterable[Batch], teacher_records: Iterable[TeacherRecords]
) -> dict[str, Any]:
    """The teacher's own numbers from its records alone, no model needed.

    Returns tokens, nll (nats per token), perplexity, accuracy (its most likely id is the true
    token), entropy (mean, nats). Raises ValueError as `evaluate` does.
    """
    columns = _joined([_teacher_columns(b, r) for b, r in _aligned(batches, teacher_records)])
    nll = float(columns["teacher_nll"].mean())
    return {
        "tokens": len(columns["teacher_nll"]),
        "nll": nll,
        "perplexity": perplexity(nll),
        "accuracy": float(columns["teacher_correct"].mean()),
        "entropy": float(columns["teacher_entropy"].mean()),
    }


def perplexity(nll: float) -> float:
    """exp of nats per token. Raises FloatingPointError when it is not finite."""
    if not math.isfinite(nll) or nll > 709:
        raise FloatingPointError(f"the loss is {nll} nats per token: the model is broken")
    return math.exp(nll)


def _measure(
    logits: Tensor, reference_logits: Tensor | None, targets: Tensor, sparse: list[Tensor]
) -> dict[str, Tensor]:
    """Values per position of one chunk; logits float32 `[tokens, vocab]`, targets `[tokens]`."""
    logprobs = torch.log_softmax(logits, dim=-1)
    top1 = logits.argmax(-1)
    values = {
        "nll": -logprobs.gather(1, targets[:, None])[:, 0],
        "correct": top1 == targets,
    }
    if reference_logits is not None:
        reference = torch.log_softmax(reference_logits, dim=-1)
        reference_top1 = reference_logits.argmax(-1)
        values["kl_to_reference"] = full_kl(reference, logprobs)
        values["top1_agreement"] = top1 == reference_top1
        values["reference_nll"] = -reference.gather(1, targets[:, None])[:, 0]
        values["reference_correct"] = reference_top1 == targets
    if sparse:
        ids, teacher, tail = sparse
        values["kl_to_teacher"] = coarsened_kl(logprobs, ids, teacher, tail)
        likeliest = ids.gather(1, teacher.argmax(1, keepdim=True))[:, 0]
        values["teacher_top1_agreement"] = top1 == likeliest
    return values


def _summary(columns: Columns, sequences: int) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        return float(columns[name].mean()) if name in columns else None

    def perplexity_of(name: str) -> float | None:
        return perplexity(float(columns[name].mean())) if name in columns else None

    kl = columns.get("kl_to_reference")
    where = columns["sequence"].astype(np.int64)
    per_sequence: dict[str, list[float]] = {
        name: np.bincount(where, weights=columns[name], minlength=sequences).tolist()
        for name in PER_SEQUENCE
        if name in columns
    }
    return {
        "tokens": len(where),
        "nll": mean("nll"),
        "perplexity": perplexity_of("nll"),
        "accuracy": mean("correct"),
        "kl_to_reference": mean("kl_to_reference"),
        "kl_to_reference_p99": None if kl is None else float(np.quantile(kl, 0.99)),
        "kl_to_reference_max": None if kl is None else float(kl.max()),
        "top1_agreement": mean("top1_agreement"),
        "reference_accuracy": mean("reference_correct"),
        "reference_perplexity": perplexity_of("reference_nll"),
        "kl_to_teacher": mean("kl_to_teacher"),
        "teacher_top1_agreement": mean("teacher_top1_agreement"),
        "teacher_accuracy": mean("teacher_correct"),
        "teacher_perplexity": perplexity_of("teacher_nll"),
        "per_sequence": {
            "tokens": np.bincount(where, minlength=sequences).tolist(),
            **per_sequence,
        },
    }


def _joined(columns: list[Columns]) -> Columns:
    if not columns or not sum(len(next(iter(part.values()))) for part in columns):
        raise ValueError("nothing to evaluate: no position of the sequences counts (loss_mask)")
    return {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}


def _aligned(
    batches: Iterable[Batch], records: Iterable[TeacherRecords] | None
) -> Iterator[tuple[Batch, TeacherRecords | None]]:
    if records is None:
        yield from ((batch, None) for batch in batches)
        return
    missing: Any = object()
    for batch, record in itertools.zip_longest(batches, records, fillvalue=missing):
        if batch is missing or record is missing:
            less = "batches than teacher records" if batch is missing else "records than batches"
            raise ValueError(f"fewer {less}: both must come from the same sequences")
        if record.ids.shape[:2] != batch.input_ids.shape:
            raise ValueError(
                f"teacher records are {list(record.ids.shape[:2])}, "
                f"their batch is {list(batch.input_ids.shape)}"
            )
        yield batch, record


def _inputs(batch: Batch, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `[batch, seq]`, counted bool `[batch, seq]`, and the counted positions' next tokens."""
    ids = place(batch.input_ids, device)
    counted = place(batch.loss_mask, device) > 0
    if bool(counted[:, -1].any()):
        raise ValueError("loss_mask counts a last position: its next token is not in the sequence")
    return ids, counted, ids.roll(-1, dims=1)[counted]


def _sparse(
    records: TeacherRecords, counted: Tensor, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        place(records.ids, device)[counted],
        place(records.logprobs, device).float()[counted],
        place(records.tail, device).float()[counted],
    )


def _teacher_columns(batch: Batch, records: TeacherRecords | None) -> Columns:
    assert records is not None
    _, counted, targets = _inputs(batch, "cpu")
    ids, logprobs, _ = _sparse(records, counted, "cpu")
    likeliest = ids.gather(1, logprobs.argmax(1, keepdim=True))[:, 0]
    where = counted.numpy()
    return {
        "teacher_nll": -records.true_logprob[where].astype(np.float64),
        "teacher_correct": (likeliest == targets).double().numpy(),
        "teacher_entropy": records.entropy[where].astype(np.float64),
    }
