"""The student inside the module that the DeepSpeed engine wraps, with its loss.

The loss is computed in this module's forward, so ZeRO-3 gathers the head for it and nothing calls
`model.module` behind the engine's back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.fused import fused_loss, head_of
from trainer.losses import Loss, Target


def last_hidden(model: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Final hidden states [tokens, hidden] of sequences [batch, seq].

    Positions that restart make transformers keep the documents of a sequence apart.
    """
    output = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    hidden = output.last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])


class StudentWithLoss(nn.Module):
    """forward(batch) -> (loss, float64 sums of each loss)."""

    def __init__(self, model: Any, losses: Mapping[str, tuple[float, Loss]], vocab: int) -> None:
        super().__init__()
        self.model = model
        self.losses = dict(losses)
        self.vocab = vocab

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_weights: Tensor,
        labels: Tensor,
        ids: Tensor | None = None,
        log_probs: Tensor | None = None,
        log_tail: Tensor | None = None,
        losses: Mapping[str, tuple[float, Loss]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch; shapes as in `loader.MicroBatch`, losses as in `fused_loss`."""
        hidden = last_hidden(self.model, input_ids, position_ids)
        head = head_of(self.model, self.vocab)
        target = Target(labels, ids, log_probs, log_tail)
        return fused_loss(hidden, head, target, token_weights, losses or self.losses)


def check_head(model: Any, vocab: int) -> None:
    """Raises ValueError if our head does not give the model's own logits.

    Guards against architectures that do more after the last hidden state than `head_of` knows.
    """
    ids = torch.arange(4, device=next(model.parameters()).device).unsqueeze(0) % vocab
    positions = torch.arange(4, device=ids.device).unsqueeze(0)
    training = model.training
    model.eval()  # dropout would make any two passes differ
    with torch.no_grad():
        own = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
        hidden = last_hidden(model, ids, positions)
        ours = head_of(model).logits(hidden)  # last: under ZeRO-3 this gathers the head
    model.train(training)
    if not torch.allclose(own, ours, atol=1e-3, rtol=1e-2):
        raise ValueError(
            f"{type(model).__name__} makes its logits in a way this version does not know "
            f"(largest difference {float((own - ours).abs().max()):.3g})"
        )


def whole_state(engine: Any, is_main: bool) -> dict[str, Tensor]:
    """The student's weights by their transformers names, on rank 0's CPU; collective.

    Under ZeRO-3 each parameter is gathered in turn, so no rank holds more than one more.
    Other ranks get an empty dictionary.
    """
    import deepspeed

    model = engine.module.model
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=None, enabled=hasattr(parameter, "ds_id")
        ):
            if is_main:
                state[name] = parameter.detach().cpu().clone()
    return state


def save_student(
    config: Any, state: dict[str, Tensor], tokenizer: Any, folder: Path, generation: Any = None
) -> None:
    """Writes a Hugging Face folder: safetensors, config, tokenizer, generation config if given.

    The weights are put into a fresh model of the same config, so that the folder's names are the
    architecture's own whatever wrapped the model in training. Raises ValueError on a misfit.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    if unexpected or left:
        raise ValueError(f"weights do not fit the config: unexpected {unexpected}, without {left}")
    model.config.dtype = next(iter(state.values())).dtype
    if generation is not None:
        model.generation_config = generation
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
