"""How well a model answers: one pass over token sequences, one plain dict back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant.evaluation.batches import (
    Batch,
    CountedLogits,
    DataHash,
    HeadLogits,
    Records,
    Sequences,
    aligned,
    batch_progress,
    inputs,
    place,
    sparse,
)
from quant.evaluation.bootstrap import description
from quant.evaluation.kl import Distribution, coarsened_kl_of, kl_of
from quant.evaluation.metrics import (
    Columns,
    interval,
    joined,
    perplexity,
    summary,
    sums_of,
    with_interval,
)
from quant.evaluation.reference import StoredReference

__all__ = ["Batch", "Records", "evaluate", "perplexity", "teacher_metrics"]

BLOCK = 1 << 18  # logits whose distributions are compared at a time: what a CPU's cache holds


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel | StoredReference,
    batches: Iterable[Batch],
    reference: PreTrainedModel | StoredReference | None = None,
    teacher_records: Iterable[Records] | None = None,
    device: torch.device | str = "cpu",
    chunk_tokens: int = 256,
    vocab: int | None = None,
    progress: Sequences | None = None,
) -> dict[str, Any]:
    """Measure `model`, also against an unquantized `reference` and a teacher's records.

    Models are moved to `device`, put into eval mode, and run in the dtype they have; softmax and
    divergences are float32, sums float64. Both may be models, or what was stored of one.
    `teacher_records` is aligned with `batches`. `chunk_tokens` bounds memory: a few float32 tensors
    `[chunk_tokens, vocab]`. Ids from `vocab` on do not exist: rows that a head has beyond its
    tokenizer are left out, as in training. `progress` is called with the sequences done, in
    fractions within a batch.

    Returns a dict for JSON; what needs a reference or records is None without. Intervals (`_low`,
    `_high`) are at 95 %, over sequences (`quant.evaluation.bootstrap`); None where one sequence
    leaves none.

    - tokens (counted positions), sequences, nll (nats per token), perplexity, accuracy (of the next
      token) with its interval;
    - with a reference: kl_to_reference (mean KL(reference || model) in nats) with _p99, _max and
      interval, top1_agreement, reference_accuracy, reference_nll, reference_perplexity;
      perplexity_ratio (to the reference's, paired) with interval; true_prob_change (mean of the
      true token's probability less the reference's) with _rms and interval;
    - with records: kl_to_teacher (coarsened to the record, see `coarsened_kl`) with _p99, _max and
      interval, teacher_top1_agreement, teacher_accuracy, teacher_nll, teacher_perplexity,
      teacher_true_prob_change;
    - kl_kinds: which divergence is exact and which is coarsened; intervals: how they were made;
    - per_sequence: for every sequence in order the number of counted `tokens`, and sums of nll,
      correct, both divergences, reference_nll, reference_correct and teacher_nll;
    - data_hash (`DataHash`: the sequences, however they are batched) and batch_sizes.

    Raises ValueError when no position counts, records and batches differ in shape or number, or a
    stored reference was made of other batches; FloatingPointError when a loss is not finite.
    """
    stored = [each for each in (model, reference) if isinstance(each, StoredReference)]
    live: list[nn.Module] = [each for each in (model, reference) if isinstance(each, nn.Module)]
    for module in live:
        module.to(device).eval()
    columns: list[Columns] = []
    data = DataHash()
    with batch_progress(progress, live) as meter:
        for batch, records in aligned(batches, teacher_records):
            sequences, index = sum(data.batch_sizes), len(data.batch_sizes)
            seen = data.add(batch)
            ids, counted, targets = inputs(batch, device)
            meter.begin(len(ids))
            tokens = (ids, place(batch.position_ids, device), counted)
            own = _logits(model, index, seen, *tokens)
            other = None if reference is None else _logits(reference, index, seen, *tokens)
            teacher = {} if records is None else _teacher_columns(batch, records)
            record = () if records is None else sparse(records, counted, device)
            rows = counted.nonzero()[:, 0] + sequences
            for first in range(0, len(own), chunk_tokens):
                last = min(first + chunk_tokens, len(own))
                found = _measured(
                    own.chunk(first, last)[:, :vocab],
                    None if other is None else other.chunk(first, last)[:, :vocab],
                    targets[first:last],
                    [tensor[first:last] for tensor in record],
                )
                found["sequence"] = rows[first:last].cpu().numpy()
                columns.append(found | {name: each[first:last] for name, each in teacher.items()})
                meter.head(last / len(own))
    for each in stored:
        each.check_end(len(data.batch_sizes))
    return summary(joined(columns), data)


def _logits(
    of: PreTrainedModel | StoredReference,
    index: int,
    seen: str,
    ids: Tensor,
    positions: Tensor,
    counted: Tensor,
) -> HeadLogits:
    """Logits of batch `index`: of a model run now, or of what was stored of one."""
    if isinstance(of, StoredReference):
        return of.batch(index, seen)
    return CountedLogits(of, ids, positions, counted)


def teacher_metrics(batches: Iterable[Batch], teacher_records: Iterable[Records]) -> dict[str, Any]:
    """The teacher's own numbers from its records alone, no model needed.

    Returns tokens, sequences, nll (nats per token), perplexity, accuracy (its most likely id is the
    true token) with its interval, entropy (mean, nats), per_sequence (tokens, and sums of nll and
    correct), intervals, data_hash and batch_sizes, as `evaluate` does. Raises ValueError likewise.
    """
    found: list[Columns] = []
    data = DataHash()
    for batch, records in aligned(batches, teacher_records):
        assert records is not None
        rows = np.nonzero(np.asarray(batch.loss_mask) > 0)[0] + sum(data.batch_sizes)
        data.add(batch)
        found.append({**_teacher_columns(batch, records), "sequence": rows})
    columns = joined(found)
    nll = float(columns["teacher_nll"].mean())
    sums = sums_of(columns, sum(data.batch_sizes))
    return {
        "tokens": len(columns["teacher_nll"]),
        "sequences": len(sums["tokens"]),
        "nll": nll,
        "perplexity": perplexity(nll),
        **with_interval("accuracy", interval(sums, "teacher_correct", 0, 1)),
        "entropy": float(columns["teacher_entropy"].mean()),
        "per_sequence": {
            "tokens": sums["tokens"].tolist(),
            "nll": sums["teacher_nll"].tolist(),
            "correct": sums["teacher_correct"].tolist(),
        },
        "intervals": description(),
        "data_hash": data.hex,
        "batch_sizes": data.batch_sizes,
    }


def _measured(
    logits: Tensor, reference_logits: Tensor | None, targets: Tensor, record: list[Tensor]
) -> Columns:
    """Values per position of one chunk; logits float32 `[tokens, vocab]`, targets `[tokens]`."""
    tokens, vocab = logits.shape
    # On a CPU a block of them passes through its cache several times, a chunk through its memory.
    rows = max(4, BLOCK // vocab) if logits.device.type == "cpu" else tokens
    parts = [
        _compared(
            logits[first : first + rows],
            None if reference_logits is None else reference_logits[first : first + rows],
            targets[first : first + rows],
            [tensor[first : first + rows] for tensor in record],
        )
        for first in range(0, tokens, rows)
    ]
    return {
        name: torch.cat([part[name].double() for part in parts]).cpu().numpy() for name in parts[0]
    }


def _compared(
    logits: Tensor, reference_logits: Tensor | None, targets: Tensor, record: list[Tensor]
) -> dict[str, Tensor]:
    own = Distribution.of(logits)
    values = {
        "nll": -own.log_prob(targets[:, None])[:, 0],
        "correct": own.top1 == targets,
    }
    if reference_logits is not None:
        other = Distribution.of(reference_logits)
        values["kl_to_reference"] = kl_of(other, own)
        values["top1_agreement"] = own.top1 == other.top1
        values["reference_nll"] = -other.log_prob(targets[:, None])[:, 0]
        values["reference_correct"] = other.top1 == targets
    if record:
        ids, teacher, tail = record
        values["kl_to_teacher"] = coarsened_kl_of(own, ids, teacher, tail)
        likeliest = ids.gather(1, teacher.argmax(1, keepdim=True))[:, 0]
        values["teacher_top1_agreement"] = own.top1 == likeliest
    return values


def _teacher_columns(batch: Batch, records: Records) -> Columns:
    """What a teacher's records say of the counted positions by themselves."""
    _, counted, targets = inputs(batch, "cpu")
    ids, log_probs, _ = sparse(records, counted, "cpu")
    likeliest = ids.gather(1, log_probs.argmax(1, keepdim=True))[:, 0]
    assert records.true_log_prob is not None and records.entropy is not None  # the kind is eval
    where = counted.flatten().numpy()
    return {
        "teacher_nll": -records.true_log_prob[where].astype(np.float64),
        "teacher_correct": (likeliest == targets).double().numpy(),
        "teacher_entropy": records.entropy[where].astype(np.float64),
    }
