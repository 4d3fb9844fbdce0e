"""From values per position to the numbers of a result: means, quantiles, intervals, sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from quant.evaluation.batches import DataHash
from quant.evaluation.bootstrap import Interval, description, mean_interval, ratio_of_perplexities

# Columns: one float64 value per counted position, all columns of the same length.
Columns = dict[str, np.ndarray]
PER_SEQUENCE = (
    "nll",
    "correct",
    "kl_to_reference",
    "kl_to_teacher",
    "reference_nll",
    "reference_correct",
    "teacher_nll",
)
KL_KINDS = {
    "kl_to_reference": "exact",
    "kl_to_teacher": "coarsened to the teacher's k likeliest ids and the rest: a lower bound",
}


def perplexity(nll: float) -> float:
    """exp of nats per token. Raises FloatingPointError when it is not finite."""
    if not math.isfinite(nll) or nll > 709:
        raise FloatingPointError(f"the loss is {nll} nats per token: the model is broken")
    return math.exp(nll)


def summary(columns: Columns, data: DataHash) -> dict[str, Any]:
    """The result of `quant.evaluation.evaluate.evaluate`, which says what is in it.

    columns: `sequence` and what was measured, by name. Raises FloatingPointError for a loss that is
    not finite.
    """
    for name in ("reference", "teacher"):  # the true token's probability: change against theirs
        if f"{name}_nll" in columns:
            theirs = np.exp(-columns[f"{name}_nll"])
            columns[f"{name}_change"] = np.exp(-columns["nll"]) - theirs

    def mean(name: str) -> float | None:
        return float(columns[name].mean()) if name in columns else None

    def perplexity_of(name: str) -> float | None:
        return perplexity(float(columns[name].mean())) if name in columns else None

    # First of all, as a broken model has no numbers to make intervals of.
    own, reference, teacher = map(perplexity_of, ("nll", "reference_nll", "teacher_nll"))
    sums = sums_of(columns, sum(data.batch_sizes))
    ratio = None
    if reference is not None:
        ratio = ratio_of_perplexities(sums["nll"], sums["reference_nll"], sums["tokens"])
    change = columns.get("reference_change")
    return {
        "tokens": len(columns["sequence"]),
        "sequences": len(sums["tokens"]),
        "nll": mean("nll"),
        "perplexity": own,
        **with_interval("accuracy", interval(sums, "correct", 0, 1)),
        **_divergence(columns, sums, "kl_to_reference"),
        "top1_agreement": mean("top1_agreement"),
        "reference_accuracy": mean("reference_correct"),
        "reference_nll": mean("reference_nll"),
        "reference_perplexity": reference,
        **with_interval("perplexity_ratio", ratio),
        **with_interval("true_prob_change", interval(sums, "reference_change")),
        "true_prob_change_rms": None if change is None else float(np.sqrt((change**2).mean())),
        **_divergence(columns, sums, "kl_to_teacher"),
        "teacher_top1_agreement": mean("teacher_top1_agreement"),
        "teacher_accuracy": mean("teacher_correct"),
        "teacher_nll": mean("teacher_nll"),
        "teacher_perplexity": teacher,
        "teacher_true_prob_change": mean("teacher_change"),
        "kl_kinds": {name: kind for name, kind in KL_KINDS.items() if name in columns},
        "intervals": description(),
        "per_sequence": {
            name: sums[name].tolist() for name in ("tokens", *PER_SEQUENCE) if name in sums
        },
        "data_hash": data.hex,
        "batch_sizes": data.batch_sizes,
    }


def _divergence(columns: Columns, sums: Columns, name: str) -> dict[str, float | None]:
    """A divergence's mean, its interval, 99 % quantile and maximum."""
    values = columns.get(name)
    return {
        **with_interval(name, interval(sums, name, low=0)),
        f"{name}_p99": None if values is None else float(np.quantile(values, 0.99)),
        f"{name}_max": None if values is None else float(values.max()),
    }


def interval(
    sums: Columns, name: str, low: float = -math.inf, high: float = math.inf
) -> Interval | None:
    """The mean over tokens of a column with its interval, within what it can be."""
    if name not in sums:
        return None
    if not np.isfinite(sums[name]).all():  # a probability of 0 where the other side has some
        return Interval(float(sums[name].sum() / sums["tokens"].sum()), None, None)
    return mean_interval(sums[name], sums["tokens"]).within(low, high)


def with_interval(name: str, found: Interval | None) -> dict[str, float | None]:
    """A result's keys of a statistic: name, name_low, name_high."""
    if found is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def sums_of(columns: Columns, sequences: int) -> Columns:
    """The sum of every column over each sequence, and its number of tokens."""
    where = columns["sequence"].astype(np.int64)
    found = {
        name: np.bincount(where, weights=values, minlength=sequences)
        for name, values in columns.items()
        if name != "sequence"
    }
    return {**found, "tokens": np.bincount(where, minlength=sequences)}


def joined(columns: list[Columns]) -> Columns:
    """Columns of all chunks. Raises ValueError when they hold no position at all."""
    if not columns or not sum(len(next(iter(part.values()))) for part in columns):
        raise ValueError("nothing to evaluate: no position of the sequences counts (loss_mask)")
    return {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
