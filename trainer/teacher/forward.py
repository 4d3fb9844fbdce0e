"""The teacher's logits made into records, a few tokens at a time on the device.

No [tokens, vocabulary] tensor is kept. Logits are made for a chunk of tokens that is large enough
for the matrix product, and worked on in tiles that stay in the processor's cache, in buffers that
are used again: on a CPU fresh memory costs more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.logits.records import Coding
from trainer.losses.fused_linear import Head, head_of
from trainer.models.head import last_hidden
from trainer.teacher.sampling import draw, uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


# Tokens of one product with the output head, and elements of one float32 tile of its logits.
CHUNK_TOKENS = 256
CPU_TILE, GPU_TILE = 1 << 20, 1 << 26


class TeacherWithRecords(nn.Module):
    """forward(batch) -> what the records of its positions are made of."""

    def __init__(self, model: PreTrainedModel, vocab: int) -> None:
        super().__init__()
        self.model = model
        self.vocab = vocab

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        coding: Coding,
        streams: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """input_ids, position_ids, labels (the next tokens): int64 [batch, seq].

        streams: int64 [batch, redraws, 4] of `sampling.stream`, for the coding "sample". places:
        int64 [T], the positions whose records are asked for, ascending, counted through all
        sequences; None: all T = batch * seq of them. Returns on the device: whether all logits are
        finite or minus infinity, bool [T]; then of "sample": ids int32 [T, redraws, draws]; of the
        others: ids int32 [T, k] with the most likely first, log-probabilities float32 [T, k], log
        tails float32 [T, temperatures]; and of "exact" entropy and the label's log-probability,
        float32 [T] both.
        """
        hidden = last_hidden(self.model, input_ids, position_ids)
        head = head_of(self.model, self.vocab)
        length = input_ids.shape[1]
        parts = []
        for tokens, logits, probabilities in tiles(head, hidden, places):
            torch.softmax(logits, dim=-1, out=probabilities)
            # One logit that is NaN or infinite makes its whole row NaN; so do none but -infinity.
            usable = ~probabilities[:, 0].isnan()
            if coding.method == "sample":
                assert streams is not None
                made = _drawn(probabilities, tokens, streams, length, coding.k)
            else:
                made = _kept(logits, probabilities, labels.reshape(-1)[tokens], coding)
            parts.append((usable, *made))
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def tiles(
    head: Head, hidden: Tensor, places: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(tokens, logits, room for as many numbers) tile by tile; each overwrites the one before.

    hidden: [all tokens, hidden]. places: int64 [some], the tokens that are wanted (None: all).
    tokens: int64 [n], some of those; logits: float32 [n, width], width being the vocabulary rounded
    up to whole blocks, minus infinity beyond it. All products have equally many rows, also where
    few are wanted, so what a token gets does not depend on its place, nor on which others are.
    """
    total, rows = hidden.shape[0], head.weight.shape[0]
    width = -(-head.vocab // BLOCK) * BLOCK
    on_cpu = hidden.device.type == "cpu"
    tile = max(8, (CPU_TILE if on_cpu else GPU_TILE) // width // 8 * 8)
    chunk = min(total, CHUNK_TOKENS if on_cpu else max(CHUNK_TOKENS, tile))
    tile = min(tile, chunk)
    raw = torch.empty(chunk, rows, dtype=hidden.dtype, device=hidden.device)
    logits = torch.full((tile, width), -torch.inf, dtype=torch.float32, device=hidden.device)
    space = torch.empty_like(logits)
    numbers = torch.arange(total, device=hidden.device)
    if places is not None:
        numbers, total = places, places.shape[0]
        hidden = hidden[places]
        if total < chunk:
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, chunk - total))
    weight = head.weight.t()
    for start in range(0, total, chunk):
        first = max(0, min(start, total - chunk))  # the last product takes some once more
        states = hidden[first : first + chunk]
        if head.bias is None:
            torch.mm(states, weight, out=raw)
        else:
            torch.addmm(head.bias, states, weight, out=raw)
        for low in range(start, min(start + chunk, total), tile):
            high = min(low + tile, start + chunk, total)
            part = logits[: high - low]
            _finish(head, raw[low - first : high - first], part[:, : head.vocab])
            yield numbers[low:high], part, space[: high - low]


def _finish(head: Head, raw: Tensor, out: Tensor) -> None:
    """Writes a head's logits (see `Head.logits`) into `out`, float32, from its raw products."""
    out.copy_(raw[:, : head.vocab])
    if head.scale != 1.0:
        out.mul_(head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)


def _drawn(
    probabilities: Tensor, tokens: Tensor, streams: Tensor, length: int, draws: int
) -> tuple[Tensor, ...]:
    sequence, position = tokens // length, tokens % length
    sets = [
        draw(probabilities, uniforms(streams[sequence, redraw], position, draws))
        for redraw in range(streams.shape[1])
    ]
    return (torch.stack(sets, dim=1),)


def _kept(
    logits: Tensor, probabilities: Tensor, labels: Tensor, coding: Coding
) -> tuple[Tensor, ...]:
    ids = largest(logits, coding.k)
    chosen = logits.gather(1, ids)
    log_first = probabilities.gather(1, ids[:, :1]).log()
    log_sum = chosen[:, :1] - log_first
    scalars = []
    if coding.method == "exact":
        # p log p is 0 where p is 0, also where log p is minus infinity.
        logs = (logits - log_sum).clamp_min_(-1e4)
        scalars.append(-logs.mul_(probabilities).sum(dim=-1))
        scalars.append((logits.gather(1, labels.unsqueeze(1)) - log_sum).squeeze(1))
    tails = log_tails(logits, probabilities, ids, log_first, coding.temperatures)
    return (ids.int(), chosen - log_sum, tails, *scalars)
