"""The next token, drawn with random numbers of its own: the same in every batch and on every rank.

transformers draws from torch's global generator, so an answer there depends on what else is in the
batch and was drawn before. Here the number is Philox4x32-10 of (seed, prompt, sample, position) and
the id is found by inverting the distribution function (`trainer.teacher.draws`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from trainer.teacher.draws import BLOCK, draw, uniforms


class NextToken(LogitsProcessor):
    """Leaves one id of each row finite, so that greedy decoding takes it.

    streams: int64 [batch, 4], `draws.stream` of each row. prompt: columns of the input that are
    the (padded) prompt. vocab: ids from there on are rows of no token. temperature 0: the most
    likely id. top_p: of the most likely ids as many as have this probability together (Holtzman et
    al., "The curious case of neural text degeneration", ICLR 2020).
    """

    def __init__(
        self, streams: Tensor, prompt: int, vocab: int, temperature: float, top_p: float
    ) -> None:
        self.streams, self.prompt, self.vocab = streams, prompt, vocab
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [batch, rows] of which all but the next id are -inf."""
        known = scores[:, : self.vocab].float()
        if self.temperature == 0:
            chosen = known.argmax(dim=-1, keepdim=True)
        else:
            probabilities = nucleus((known / self.temperature).softmax(dim=-1), self.top_p)
            place = torch.full(
                (len(scores),), input_ids.shape[1] - self.prompt, device=scores.device
            )
            numbers = uniforms(self.streams, place, 1)
            padded = torch.nn.functional.pad(probabilities, (0, -self.vocab % BLOCK))
            chosen = draw(padded, numbers).long()
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [rows, vocab] with 0 for all ids outside of the nucleus; not normalized."""
    if top_p >= 1:
        return probabilities
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    return torch.zeros_like(probabilities).scatter_(1, ids, kept)
