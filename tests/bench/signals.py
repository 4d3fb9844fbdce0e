"""What a student can be taught with, from one pass of the demo's teacher: targets of the loss.

full            every id of the vocabulary: full knowledge distillation
sample_50       50 draws of set 0 (or of another set), through the cache's codec
top_50_tail     the 50 most likely ids and the mass of the rest, through the cache's codec
top_50, top_12  the same without the rest, renormalized, as others cache them
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.corpus.corpus import Batch, next_tokens
from trainer.logits.codebook import Codebook
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import decode_many, encode
from trainer.logits.records import Draws, Records, coding_of
from trainer.losses.divergences import Target
from trainer.losses.fused_linear import head_of
from trainer.models.head import last_hidden
from trainer.spec.sections import CacheSpec
from trainer.teacher.sampling import draw, stream, uniforms

SPECS = {
    "sample_50": CacheSpec(method="sample", draws=50),
    "top_50_tail": CacheSpec(method="topk", k=50),
}
BARE = {"top_50": 50, "top_12": 12}


@dataclass
class Teacher:
    """The teacher and its codebooks, each fitted on the first batch that needs it."""

    model: Any
    vocab: int
    codebooks: dict[str, Codebook] = field(default_factory=dict)

    def log_probs(self, batch: Batch) -> Tensor:
        """Float32 [tokens, vocab]: the teacher's log-softmax."""
        with torch.no_grad():
            hidden = last_hidden(
                self.model,
                torch.from_numpy(batch.input_ids),
                torch.from_numpy(batch.position_ids),
            )
            logits = head_of(self.model, self.vocab).logits(hidden)[:, : self.vocab]
            return torch.log_softmax(logits, dim=-1)

    def target(self, name: str, batch: Batch, log_p: Tensor, redraw: int = 0) -> Target:
        """The batch's target of the signal `name`; see the module's docstring."""
        labels = torch.from_numpy(next_tokens(batch.input_ids).reshape(-1))
        nothing = torch.full((len(log_p),), float("-inf"))
        if name == "full":
            ids = torch.arange(self.vocab).expand(len(log_p), -1)
            return Target(labels, ids, log_p, nothing)
        if name in BARE:
            kept, ids = log_p.topk(BARE[name], dim=-1)
            return Target(labels, ids, kept, nothing)
        return self.decoded(name, self.encoded(name, batch, log_p, redraw), labels)

    def encoded(self, name: str, batch: Batch, log_p: Tensor, redraw: int = 0) -> list[bytes]:
        """The batch's records, one sequence each, as a cache stores them."""
        length = batch.input_ids.shape[1]
        items: list[Records | Draws]
        if name == "sample_50":
            rows = _draws(log_p, batch.keys, length, SPECS[name], redraw)
            items = [Draws(ids) for ids in rows.reshape(-1, length, rows.shape[1])]
        else:
            kept, ids = log_p.topk(SPECS[name].k, dim=-1)
            tails = torch.logsumexp(log_p.scatter(1, ids, float("-inf")), dim=-1, keepdim=True)
            arrays = ids.numpy(), kept.numpy(), tails.numpy()
            items = [
                Records(*(array[i : i + length] for array in arrays))
                for i in range(0, len(log_p), length)
            ]
        if name not in self.codebooks:
            coding = coding_of(SPECS[name], self.vocab, "train")
            self.codebooks[name] = fit_codebook(coding, items)
        return [encode(item, self.codebooks[name]) for item in items]

    def decoded(self, name: str, blobs: list[bytes], labels: Tensor) -> Target:
        """The target in stored records of consecutive sequences."""
        found = decode_many(blobs, self.codebooks[name])
        return Target(
            labels,
            torch.from_numpy(found.ids),
            torch.from_numpy(found.log_probs),
            torch.from_numpy(found.log_tails[:, 0]),
        )


def _draws(
    log_p: Tensor, keys: Any, length: int, spec: CacheSpec, redraw: int
) -> np.ndarray[Any, Any]:
    """Draws of a batch as a capture makes them: int32 [tokens, draws]."""
    streams = torch.tensor([stream(spec.seed, key.tobytes(), redraw) for key in keys])
    positions = torch.arange(length).repeat(len(keys))
    numbers = uniforms(streams.repeat_interleave(length, dim=0), positions, spec.draws)
    return draw(log_p.exp(), numbers).numpy()
