"""Kullback-Leibler divergences per position: over the full vocabulary, and to a sparse record."""

from __future__ import annotations

import torch
from torch import Tensor

# A teacher's tail below float32 resolution is rounding, not mass that a student missed.
ROUNDING = 2.0**-23


def full_kl(reference: Tensor, model: Tensor) -> Tensor:
    """KL(reference || model) in nats, `[tokens]`; both are log-probs `[tokens, vocab]`.

    A reference probability of 0 contributes 0, also where the model's is 0 too (-inf logits).
    """
    probability = reference.exp()
    terms = probability * (reference - model)
    return terms.masked_fill_(probability == 0, 0.0).sum(1)


def coarsened_kl(model: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    """KL(record || model) in nats over the record's ids plus one bucket for all other ids.

    model: log-probs `[tokens, vocab]`; ids int64, logprobs float32 `[tokens, k]` (natural log of
    the teacher's full softmax), tail float32 `[tokens]` its mass outside the ids. Returns
    `[tokens]`. Both sides use their own tail:

        sum_i p_i ln(p_i / q_i) + p_tail ln(p_tail / q_tail) - (sum_i p_i + p_tail) + 1

    The last two terms are 0 for an exact record; with them rounding in a stored record enters
    in second order only (generalized KL). The result is a lower bound of the full KL.
    Ids that the model's vocabulary lacks, and empty slots (logprob -inf), go to the tail. The
    model's tail is a logsumexp over the other ids: 1 - sum(q) would cancel in float32.
    """
    vocab = model.shape[1]
    empty = logprobs == -torch.inf
    kept = (ids >= 0) & (ids < vocab) & ~empty
    p = logprobs.exp()
    p_tail = tail + p.masked_fill(kept, 0.0).sum(1)
    p = p.masked_fill(~kept, 0.0)
    # An extra column takes the slots that are not kept, so that they hide no id of the model's.
    others = torch.cat([model, model.new_full((model.shape[0], 1), -torch.inf)], dim=1)
    safe = torch.where(kept, ids, vocab)
    log_q = others.gather(1, safe)
    others.scatter_(1, safe, -torch.inf)
    log_q_tail = torch.logsumexp(others, dim=1)

    head = torch.where(kept & (p > 0), p * (logprobs - log_q), 0.0).sum(1)
    nothing_left = torch.isneginf(log_q_tail) & (p_tail <= ROUNDING)
    p_tail = p_tail.masked_fill(nothing_left | (p_tail < 0), 0.0)
    rest = torch.where(p_tail > 0, p_tail * (p_tail.log() - log_q_tail), 0.0)
    return head + rest - (p.sum(1) + p_tail) + 1.0
