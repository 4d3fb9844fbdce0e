"""A model's output head: the way from final hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Matrix units want rows of whole 16 bytes: products are made for a multiple of so many ids.
_ALIGNED = 8


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

    @property
    def width(self) -> int:
        """Rows that a product is made of: the vocabulary, filled up where there are more rows."""
        return min(self.weight.shape[0], -(-self.vocab // _ALIGNED) * _ALIGNED)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [tokens, rows] of hidden states [tokens, hidden]; -inf from `vocab` on."""
        raw = nn.functional.linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.softcap is not None:
            raw = torch.tanh(raw / self.softcap) * self.softcap
        if self.vocab < raw.shape[1]:
            raw[:, self.vocab :] = float("-inf")
        return raw

    def product(self, hidden: Tensor) -> Tensor:
        """hidden @ weight.T + bias, [tokens, width], in the dtype of the weight."""
        bias = None if self.bias is None else self.bias[: self.width]
        return nn.functional.linear(hidden, self.weight[: self.width], bias)

    def finish_(self, product: Tensor, needs_slope: bool = False) -> Tensor | None:
        """Makes logits of a float32 part of `product`, in place.

        Returns the softcap's derivative there, for `back_`; None without a cap or if not asked.
        """
        if self.scale != 1.0:
            product.mul_(self.scale)
        if self.softcap is None:
            return None
        product.div_(self.softcap).tanh_()
        slope = torch.addcmul(product.new_ones(()), product, product, value=-1)
        product.mul_(self.softcap)
        return slope if needs_slope else None

    def back_(self, grad: Tensor, slope: Tensor | None) -> Tensor:
        """Gradient of the product from the gradient of the logits, in place."""
        if slope is not None:
            grad.mul_(slope)
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


def head_of(model: PreTrainedModel, vocab: int | None = None) -> Head:
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


def last_hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Final hidden states [tokens, hidden] of sequences [batch, seq].

    Positions that restart make transformers keep the documents of a sequence apart.
    """
    output = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    hidden = output.last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])


def check_head(model: PreTrainedModel, vocab: int) -> None:
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
