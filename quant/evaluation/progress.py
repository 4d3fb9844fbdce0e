"""How far a pass over batches of sequences is, also within a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from trainer.progress import layer_progress

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
        self._tell(self._forward * (self._passed + share) / self._models)
        self._passed += share == 1

    def head(self, share: float) -> None:
        """Of the batch's tokens that share has been measured."""
        self._tell(self._forward + (1 - self._forward) * share)

    def end(self) -> None:
        """The last batch is done."""
        self.begin(0)

    def _tell(self, share: float) -> None:
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
