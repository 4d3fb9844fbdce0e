"""The student inside the module that the DeepSpeed engine wraps, with its loss.

The loss is computed in this module's forward, so ZeRO-3 gathers the head for it and nothing calls
`model.module` behind the engine's back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.fused import Head, fused_loss, head_of
from trainer.head import last_hidden
from trainer.losses import Loss, Target
from trainer.student.features import HiddenLoss, HiddenPlan, collected


class StudentWithLoss(nn.Module):
    """forward(batch, losses) -> (loss, float64 sums of each loss).

    hidden: which hidden states are compared with the teacher's, None for none; what that learns is
    drawn from `seed` and is no part of `model`.
    """

    def __init__(
        self, model: Any, vocab: int, hidden: HiddenPlan | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.model = model
        self.vocab = vocab
        dtype = next(model.parameters()).dtype
        self.hidden = None if hidden is None else HiddenLoss(hidden, dtype, seed)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_weights: Tensor,
        labels: Tensor,
        losses: Mapping[str, tuple[float, Loss]],
        ids: Tensor | None = None,
        log_probs: Tensor | None = None,
        log_tail: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        teacher_head: Head | None = None,
        teacher_states: Sequence[Tensor] | None = None,
        hidden_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch; shapes as in `loader.MicroBatch`, losses as in `fused_loss`.

        A teacher that runs beside the student gives instead of records its final hidden states
        [tokens, teacher width] and its head; and teacher_states, [batch, seq, teacher width] for
        each pair of layers, for the distance of hidden states, which counts `hidden_weight`. The
        sums are float64 [losses], and one more with teacher_states: that distance.
        """
        compared = None if teacher_states is None else self.hidden
        layers = [] if compared is None else compared.plan.student_layers
        with collected(self.model, layers) as states:
            hidden = last_hidden(self.model, input_ids, position_ids)
        if losses:
            head = head_of(self.model, self.vocab)
            target = Target(labels, ids, log_probs, log_tail)
            if teacher_head is not None:
                target = replace(target, teacher_hidden=teacher_hidden, teacher_head=teacher_head)
            loss, sums = fused_loss(hidden, head, target, token_weights, losses)
        else:
            loss, sums = hidden.new_zeros((), dtype=torch.float32), token_weights.new_zeros(0)
        if teacher_states is None:
            return loss, sums
        if compared is None:
            raise ValueError("teacher_states need a plan of the hidden states to compare")
        own = [states[layer] for layer in layers]
        distance = compared(own, teacher_states, token_weights)
        return (
            loss + hidden_weight * distance.float(),
            torch.cat([sums.double(), distance.detach().unsqueeze(0)]),
        )
