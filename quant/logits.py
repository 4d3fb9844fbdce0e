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


class CountedLogits:
    """One forward pass over a batch; `chunk` then gives logits of the counted positions.

    input_ids, position_ids: int64 `[batch, seq]`; counted: bool `[batch, seq]`.
    """

    def __init__(
        self, model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, counted: Tensor
    ) -> None:
        self._model = model
        self._base: nn.Module | None = getattr(model, model.base_model_prefix or "", None)
        # The head is a module of its own beside the base: only then can it run by itself.
        runs = model if self._base is None or self._base is model else self._base
        output = runs(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            self._base, hidden = None, output.logits
        self._rows = hidden[counted]  # [tokens, hidden], or [tokens, vocab] without a base
        self._output_type = type(output)
        self._ids = input_ids

    def __len__(self) -> int:
        return self._rows.shape[0]

    def chunk(self, first: int, last: int) -> Tensor:
        """float32 `[last - first, vocab]`: exactly what the model's own forward makes of them.

        The model's forward runs with its base replaced by the hidden states at hand, so scaling,
        soft-capping and whatever else an architecture does to its logits is done.
        """
        rows = self._rows[first:last]
        if self._base is None:
            return rows.float()
        output = self._output_type(last_hidden_state=rows.unsqueeze(0))
        ids = self._ids.new_zeros(1, rows.shape[0])
        with _returning(self._base, output):
            logits = self._model(input_ids=ids, use_cache=False).logits
        if logits.shape[:2] != ids.shape:
            raise RuntimeError(
                f"{type(self._model).__name__} gave logits {list(logits.shape)} for "
                f"{rows.shape[0]} hidden states"
            )
        return logits[0].float()


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
