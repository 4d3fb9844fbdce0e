"""Does the kernel that a quantized model decodes with answer as its weights say?"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant.divergence import full_kl
from quant.kernels import use_kernels

PROMPT, STEPS = 8, 24


def kernel_kl(model: PreTrainedModel) -> float:
    """Mean KL(plain || chosen) in nats: next-token distributions of `model` with the kernels that
    it has, against those of dequantized weights.

    Both decode the same random ids, a prompt and then one id at a time, so nothing but the
    kernels differs. The evaluation of a cell runs dequantized weights: this is what its numbers
    leave out. Leaves `model` with plain kernels.
    """
    config = model.config.get_text_config()
    length = min(PROMPT + STEPS, getattr(config, "max_position_embeddings", None) or PROMPT + STEPS)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator).to(model.device)
    chosen = _logprobs(model, ids)
    use_kernels(model, "plain")
    # In double precision: of a kernel that answers as the plain weights do, what float32 rounds off
    # would be less than nothing.
    plain = _logprobs(model, ids).double().log_softmax(-1)
    return max(0.0, float(full_kl(plain, chosen.double().log_softmax(-1)).mean()))


@torch.no_grad()
def _logprobs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """float32 `[1 + further ids, vocab]` after the prompt and after each id that follows it."""
    found, cache = [], None
    for part in (ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[0, -1].float().log_softmax(-1))
    return torch.stack(found)
