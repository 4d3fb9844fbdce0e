"""Records of the teacher's distributions: arrays, their coding, and the kinds a spec asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.spec.sections import CacheSpec

MAX_VOCABULARY = 1 << 20
VERSION = 2  # of the records' format


@dataclass(frozen=True)
class Records:
    """The teacher's distributions at consecutive positions, as the losses read them.

    ids: int64 [positions, width]. log_probs: float32 [positions, width], natural log at
    temperature 1: of the full softmax (topk, exact), or of the share of the draws (sample). A row
    with fewer ids is filled up with its first id at a log-probability of minus infinity.
    log_tails: float32 [positions, temperatures], log of the sum over all other ids of p^(1/T);
    minus infinity without a tail. entropy (nats) and true_log_prob: float32 [positions], in
    records for evaluation only; those have the most likely id first.
    """

    ids: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    log_tails: NDArray[np.float32]
    entropy: NDArray[np.float32] | None = None
    true_log_prob: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Draws:
    """Ids drawn with replacement from the teacher's softmax: int32 [positions, draws], each row
    in ascending order, repeats included."""

    ids: NDArray[np.int32]


@dataclass(frozen=True)
class Coding:
    """What is kept of every distribution, and how finely.

    method: "topk" (for losses), "sample" (for losses), or "exact" (for evaluation: half-precision
    log-probabilities, entropy and the true token's log-probability). vocab: number of ids. k: ids
    per position, or draws. temperatures: whose tails are kept ("sample" has none). step: the
    quantization step of the square root of a probability. keep: ids whose root is below keep x
    step go to the tail (0: none does).
    """

    method: Literal["topk", "sample", "exact"]
    vocab: int
    k: int
    temperatures: tuple[float, ...] = (1.0,)
    step: float = 0.0155
    keep: float = 0.0


# Ids kept in records for evaluation, whatever the method for training.
EVAL_IDS = 256


def train_kind(redraw: int) -> str:
    """The kind of the records for training: `train`, and `train1`... for further draws."""
    return f"train{redraw}" if redraw else "train"


def train_kinds(spec: CacheSpec) -> list[str]:
    """The kinds of records for training that a spec asks for."""
    return [train_kind(redraw) for redraw in range(spec.redraws)]


def coding_of(spec: CacheSpec, vocab: int, kind: str) -> Coding:
    """What is kept of every distribution in the records of one kind."""
    if kind == "eval":
        return Coding("exact", vocab, min(EVAL_IDS, vocab))
    if spec.method == "sample":
        return Coding("sample", vocab, spec.draws, temperatures=())
    step = 0.0155 * (50 / spec.k) ** 0.36 if spec.step == "auto" else spec.step
    k = min(spec.k, vocab)
    return Coding("topk", vocab, k, tuple(spec.temperatures), step, spec.keep)
