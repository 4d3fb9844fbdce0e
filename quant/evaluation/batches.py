"""Batches of sequences with the teacher's records of them, and a model's logits at their positions.

Position t is about the prediction of token t + 1; `loss_mask[t] = 1` says that it counts. The head
is applied to a chunk of tokens at a time: over all positions of a batch its logits would be
`[tokens, vocab]`, for large vocabularies most of the memory of an evaluation.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.corpus.corpus import Batch
from trainer.logits.records import Records
from trainer.models.load import layer_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
def _returning(module: nn.Module, output: object) -> Iterator[None]:
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


def place(array: NDArray[Any] | Tensor, device: torch.device | str) -> Tensor:
    """A numpy array as a tensor on `device`, integers as int64."""
    tensor = torch.as_tensor(array)
    if not tensor.is_floating_point() and tensor.dtype != torch.bool:
        tensor = tensor.long()
    return tensor.to(device)


class DataHash:
    """A running blake2b-128 over sequences in order: ids, positions and loss masks.

    The same sequences have the same hash however they are cut into batches.
    """

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16)
        self.batch_sizes: list[int] = []

    def add(self, batch: Batch) -> str:
        """Take one more batch; returns the hash, in hex, of all up to here."""
        columns = (
            np.ascontiguousarray(batch.input_ids, "<i8"),
            np.ascontiguousarray(batch.position_ids, "<i8"),
            np.ascontiguousarray(batch.loss_mask, "<f4"),
        )
        for row in zip(*columns, strict=True):
            self._state.update(len(row[0]).to_bytes(8, "little"))
            for column in row:
                self._state.update(column.tobytes())
        self.batch_sizes.append(len(columns[0]))
        return self.hex

    @property
    def hex(self) -> str:
        """The hash of all batches so far."""
        return self._state.hexdigest()


def aligned(
    batches: Iterable[Batch], records: Iterable[Records] | None
) -> Iterator[tuple[Batch, Records | None]]:
    """Each batch with its records. Raises ValueError when they differ in shape or number."""
    if records is None:
        yield from ((batch, None) for batch in batches)
        return
    missing: Any = object()
    for batch, record in itertools.zip_longest(batches, records, fillvalue=missing):
        if batch is missing or record is missing:
            less = "batches than teacher records" if batch is missing else "records than batches"
            raise ValueError(f"fewer {less}: both must come from the same sequences")
        if len(record.ids) != batch.input_ids.size:
            raise ValueError(
                f"teacher records are of {len(record.ids)} positions, their batch of "
                f"{batch.input_ids.size}"
            )
        yield batch, record


def inputs(batch: Batch, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `[batch, seq]`, counted bool `[batch, seq]`, and the counted positions' next tokens.

    Raises ValueError when a last position counts.
    """
    ids = place(batch.input_ids, device)
    counted = place(batch.loss_mask, device) > 0
    if bool(counted[:, -1].any()):
        raise ValueError("loss_mask counts a last position: its next token is not in the sequence")
    return ids, counted, ids.roll(-1, dims=1)[counted]


def sparse(
    records: Records, counted: Tensor, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Records at the counted positions: ids int64, log_probs `[tokens, k]`, tail `[tokens]`.

    The tail is a probability, at temperature 1.
    """
    rows = counted.flatten()
    return (
        place(records.ids, device)[rows],
        place(records.log_probs, device).float()[rows],
        place(np.exp(records.log_tails[:, 0]), device).float()[rows],
    )


Sequences = Callable[[float], None]
# Of the time of a batch where a model runs; the rest is its head and what is made of the logits.
FORWARD = 0.7


class BatchProgress:
    """Calls `say` with the sequences that are done, in fractions while a batch is under way."""

    def __init__(self, say: Sequences, models: int, forward: float) -> None:
        self._say, self._models = say, models
        self._forward = forward if models else 0.0
        self._done = self._size = self._passed = 0

    def begin(self, size: int) -> None:
        """A batch of so many sequences comes next; the one before is done."""
        self._done, self._size, self._passed = self._done + self._size, size, 0
        self._say(self._done)

    def layer(self, share: float) -> None:
        """A model has passed that share of its layers."""
        self._notify(self._forward * (self._passed + share) / self._models)
        self._passed += share == 1

    def head(self, share: float) -> None:
        """Of the batch's tokens that share has been measured."""
        self._notify(self._forward + (1 - self._forward) * share)

    def end(self) -> None:
        """The last batch is done."""
        self.begin(0)

    def _notify(self, share: float) -> None:
        self._say(self._done + self._size * min(share, 1.0))


@contextmanager
def batch_progress(
    say: Sequences | None, models: Sequence[nn.Module], forward: float = FORWARD
) -> Iterator[BatchProgress]:
    """A `BatchProgress` for passes of `models`; None: nobody listens.

    forward: the share of a batch's time that the models' layers take.
    """
    with ExitStack() as hooks:
        meter = BatchProgress(say or (lambda done: None), len(models), forward)
        for model in models if say else ():
            hooks.enter_context(layer_progress(model, meter.layer))
        yield meter
        meter.end()
