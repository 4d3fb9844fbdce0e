"""A model's logits at chosen positions, the head applied to a chunk of tokens at a time.

A head over all positions of a batch would need `[tokens, vocab]` at once, which for large
vocabularies is most of the memory of an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class HeadLogits:
    """Logits made of hidden states that are at hand.

    rows: `[tokens, hidden]`, what the base of `model` gave as its last hidden states at some
    positions, or `[tokens, vocab]`, logits, for a model whose base cannot run by itself (`base` is
    None then). output_type: what the base returns. vocab: ids from there on are left out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: nn.Module | None,
        rows: Tensor,
        output_type: type,
        vocab: int | None = None,
    ) -> None:
        self.model = model
        self.base = base
        self.rows = rows
        self.output_type = output_type
        self.vocab = vocab

    def __len__(self) -> int:
        return self.rows.shape[0]

    def chunk(self, first: int, last: int) -> Tensor:
        """float32 `[last - first, vocab]`: exactly what the model's own forward makes of them.

        The model's forward runs with its base replaced by the hidden states at hand, so scaling,
        soft-capping and whatever else an architecture does to its logits is done.
        """
        rows = self.rows[first:last]
        if self.base is None:
            return rows[:, : self.vocab].float()
        output = self.output_type(last_hidden_state=rows.unsqueeze(0))
        ids = torch.zeros(1, rows.shape[0], dtype=torch.int64, device=rows.device)
        with _returning(self.base, output):
            logits = self.model(input_ids=ids, use_cache=False).logits
        if logits.shape[:2] != ids.shape:
            raise RuntimeError(
                f"{type(self.model).__name__} gave logits {list(logits.shape)} for "
                f"{rows.shape[0]} hidden states"
            )
        return logits[0, :, : self.vocab].float()


class CountedLogits(HeadLogits):
    """One forward pass over a batch; `chunk` then gives logits of the counted positions.

    input_ids, position_ids: int64 `[batch, seq]`; counted: bool `[batch, seq]`.
    """

    def __init__(
        self, model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, counted: Tensor
    ) -> None:
        base: nn.Module | None = getattr(model, model.base_model_prefix or "", None)
        # The head is a module of its own beside the base: only then can it run by itself.
        runs = model if base is None or base is model else base
        output = runs(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            base, hidden = None, output.logits
        super().__init__(model, base, hidden[counted], type(output))


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Within the block calling `module` returns `output`; on the instance alone."""
    missing = object()
    previous = module.__dict__.get("forward", missing)
    module.forward = lambda *args, **kwargs: output  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if previous is not missing:
            module.forward = previous  # type: ignore[assignment]


def place(array: Any, device: torch.device | str) -> Tensor:
    """A numpy array as a tensor on `device`, integers as int64."""
    tensor = torch.as_tensor(array)
    if not tensor.is_floating_point() and tensor.dtype != torch.bool:
        tensor = tensor.long()
    return tensor.to(device)
