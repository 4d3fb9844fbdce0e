"""Which records a logit cache holds, by the spec: kinds, and what is kept for each."""

from __future__ import annotations

from trainer.logits.records import Coding
from trainer.spec import CacheSpec

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
