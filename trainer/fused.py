"""Output head and loss in one pass over chunks of tokens.

The logits of a chunk are made, turned into loss and gradient, and dropped, so no
[tokens, vocab] tensor exists; the gradients of hidden states and head come out of the same pass.
The idea is Liger Kernel's fused linear cross-entropy (Hsu et al., 2024); here over any mix of
losses of `trainer.losses`, dense or sparse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.losses import Loss, Target

# Elements of one float32 chunk of logits: 16 Mi = 64 MiB.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Head:
    """A model's way from hidden states to logits.

    logits = softcap(scale * (hidden @ weight.T + bias)); ids from `vocab` on do not exist.
    weight: [rows, hidden], rows >= vocab. softcap(x) = cap * tanh(x / cap), or x without a cap.
    """

    weight: Tensor
    bias: Tensor | None
    vocab: int
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [tokens, rows] of hidden states [tokens, hidden]."""
        raw = nn.functional.linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.softcap is not None:
            raw = torch.tanh(raw / self.softcap) * self.softcap
        if self.vocab < raw.shape[1]:
            raw[:, self.vocab :] = float("-inf")
        return raw

    def back(self, logits: Tensor, grad: Tensor) -> Tensor:
        """Gradient before scale and softcap, from the gradient of `logits`; changes `grad`."""
        if self.softcap is not None:
            slope = 1.0 - (logits / self.softcap).square_()
            if self.vocab < grad.shape[1]:
                slope[:, self.vocab :] = 0.0
            grad = grad.mul_(slope)
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


def head_of(model: Any, vocab: int | None = None) -> Head:
    """The head of a transformers causal language model; `vocab` cuts padded rows off.

    Reads the weight itself, so under ZeRO-3 call it inside the wrapped module's forward.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise ValueError(f"{type(model).__name__} has no output head; needs a causal model")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    weight = module.weight
    rows = int(getattr(weight, "ds_shape", weight.shape)[0])
    return Head(
        weight,
        getattr(module, "bias", None),
        min(vocab or rows, rows),
        scale,
        float(cap) if cap else None,
    )


def chunk_tokens(rows: int) -> int:
    """Tokens per chunk for a head of so many rows."""
    return max(16, CHUNK_ELEMENTS // rows)


class _FusedLoss(torch.autograd.Function):
    """Sum over tokens of weight x loss; gradients are made in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        target: Target,
        token_weights: Tensor,
        losses: Mapping[str, tuple[float, Loss]],
        step: int,
    ) -> tuple[Tensor, Tensor]:
        tokens = hidden.shape[0]
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        weight_grad = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if ctx.needs_input_grad[1]
            else None
        )
        bias_grad = (
            torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
            if bias is not None and ctx.needs_input_grad[2]
            else None
        )
        sums = torch.zeros(len(losses), dtype=torch.float64, device=hidden.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            rows = target.rows(start, stop)
            scales = token_weights[start:stop]
            logits = head.logits(hidden[start:stop])
            grad: Tensor | None = None
            for index, (share, loss) in enumerate(losses.values()):
                value, part = loss.value_and_grad(logits, rows)
                # Tokens of weight 0 may hold anything, also infinities: never multiply them in.
                value = torch.where(scales > 0, value * scales, torch.zeros_like(value)).double()
                sums[index] += value.sum()
                total += share * value.sum()
                if needs_grad:
                    part = part.mul_((share * scales).unsqueeze(1))
                    grad = part if grad is None else grad.add_(part)
            if grad is None:
                continue
            grad = head.back(logits, grad)
            grad.masked_fill_((scales <= 0).unsqueeze(1), 0.0)
            low = grad.to(weight.dtype)
            if hidden_grad is not None:
                hidden_grad[start:stop] = low @ weight
            if weight_grad is not None:
                weight_grad.add_(low.t() @ hidden[start:stop])
            if bias_grad is not None:
                bias_grad += grad.sum(dim=0)
        ctx.save_for_backward(
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
        )
        ctx.mark_non_differentiable(sums)
        return total.float(), sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        scale = grads[0]

        def times(value: Tensor | None) -> Tensor | None:
            return None if value is None else value * scale.to(value.dtype)

        return times(hidden_grad), times(weight_grad), times(bias_grad), *[None] * 5


def fused_loss(
    hidden: Tensor,
    head: Head,
    target: Target,
    token_weights: Tensor,
    losses: Mapping[str, tuple[float, Loss]],
    tokens_per_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of losses over tokens, without ever holding all logits.

    hidden: [tokens, hidden]; target: see `Target`; token_weights: float32 [tokens], 0 = left out.
    Returns the loss (float32 scalar, differentiable in hidden, head weight and bias): sum over
    tokens and losses of share x token weight x loss; and float64 [losses], each loss's own sum
    (not differentiable, shares left out).
    """
    step = tokens_per_chunk or chunk_tokens(head.weight.shape[0])
    return _FusedLoss.apply(
        hidden, head.weight, head.bias, head, target, token_weights, losses, step
    )
