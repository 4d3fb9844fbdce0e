"""The most likely ids of each row and the mass of all others, in few passes over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Ids whose largest logit stands for them at first.
BLOCK = 32
# So many times more candidates than rows have would make the detour longer than the way.
WORTH = 2


def largest(logits: Tensor, k: int) -> Tensor:
    """The ids of the k largest logits, int64 [rows, k]: largest first, lower ids first at a tie.

    logits: float32 [rows, width], width a multiple of `BLOCK`, k <= width.
    """
    rows, width = logits.shape
    if k * BLOCK * WORTH >= width:
        return _first(logits, k)
    # Blocks in the order of their largest logit, ties by place: k blocks before one that is left
    # out have k logits that come before all of its own.
    blocks = logits.view(rows, width // BLOCK, BLOCK)
    chosen = _first(blocks.amax(dim=-1), k).sort(dim=-1).values
    inside = blocks.gather(1, chosen.unsqueeze(-1).expand(rows, k, BLOCK))
    found = _first(inside.view(rows, k * BLOCK), k)
    return chosen.gather(1, found // BLOCK) * BLOCK + found % BLOCK


def _first(values: Tensor, k: int) -> Tensor:
    """Places of the k largest of float32 [rows, n], largest first, lower places first at a tie.

    Found by integers: in the upper half the float's bits in ascending order, in the lower half the
    place, counted down.
    """
    bits = values.contiguous().view(torch.int32)
    ascending = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    last = values.shape[1] - 1
    keys = ascending + torch.arange(last, -1, -1, device=values.device)
    return last - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def log_tails(
    logits: Tensor,
    probabilities: Tensor,
    ids: Tensor,
    log_first: Tensor,
    temperatures: Sequence[float],
) -> Tensor:
    """Log of the sum over all ids but `ids` of p^(1/T): float32 [rows, temperatures].

    logits, probabilities: float32 [rows, width]; the latter are changed. ids: int64 [rows, k], the
    largest first. log_first: float32 [rows, 1], log-probability of the first. Sums are over the
    others alone, never a difference to 1; minus infinity if there are none.
    """
    result = []
    for temperature in temperatures:
        if temperature == 1.0:
            shares, log_scale = probabilities, torch.zeros_like(log_first)
        else:
            shares = torch.softmax(logits / temperature, dim=-1)
            log_scale = log_first / temperature - shares.gather(1, ids[:, :1]).log()
        others = shares.scatter_(1, ids, 0.0).sum(dim=-1, keepdim=True)
        result.append(others.log() + log_scale)
    return torch.cat(result, dim=-1)
