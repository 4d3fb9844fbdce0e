"""The work of a model's passes, and the seconds that a worker takes for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.plan.place import Place
from jobs.plan.shape import Shape
from trainer.processor import DtypeName
from trainer.resolve_auto import activation_bytes

# On CPUs, measured on one thread of a Zen 4 (float32: 103e9 operations per second), width 128 to
# 576, in float32, in bfloat16 and with AVX2 alone (docs/plan.md): the share of a core's peak that
# products of matrices reach, and nanoseconds of all else, which hardly depends on the dtype.
PRODUCTS = 0.86
REFERENCE_FLOPS = 103e9  # a core of another float32 peak takes other nanoseconds, by that ratio
TRAIN_NS = 1.5  # a forward and backward pass, per byte of `activation_bytes` and token
FORWARD_NS = 0.2  # a forward pass alone
LOSS_NS = 8.7  # head and loss of a training, per id of the vocabulary and token
RECORD_NS = 20.0  # a record of the cache, per id and token: softmax, top k, coding
EVALUATE_NS = 8.7  # a distribution compared with another, per id and token
OPTIMIZER_NS = 9.4  # AdamW with float32 masters, per parameter and step


@dataclass(frozen=True)
class Work:
    """What is done in one dtype. flops: operations of products. other_ns: what else a CPU does,
    in nanoseconds of the core that was measured."""

    flops: float
    dtype: DtypeName
    other_ns: float = 0.0

    def seconds(self, place: Place, cpus: int, gpus: float, utilisation: float) -> float | None:
        """Of one worker. utilisation: of a GPU's peak; a CPU's follows from `other_ns`. None where
        the peak is not known."""
        peak = place.flops(cpus, gpus, self.dtype)
        if peak is None:
            return None
        if gpus:
            return self.flops / (peak * utilisation)
        slower = REFERENCE_FLOPS / place.core.float32
        return self.flops / (peak * PRODUCTS) + 1e-9 * self.other_ns * slower / cpus


def seconds_of(
    works: Sequence[Work], place: Place, cpus: int, gpus: float, utilisation: float
) -> float | None:
    """Seconds of one worker for all of it; None where a peak is not known."""
    each = [work.seconds(place, cpus, gpus, utilisation) for work in works]
    known = [seconds for seconds in each if seconds is not None]
    return sum(known) if len(known) == len(each) else None


def forward(shape: Shape, length: int, tokens: float, dtype: DtypeName, per_id: float) -> Work:
    """Forward passes over so many tokens. per_id: nanoseconds of what is made of the logits."""
    layers = FORWARD_NS * activation_bytes(dict(shape.raw))
    return Work(
        shape.forward_flops(length) * tokens, dtype, tokens * (layers + per_id * shape.vocab)
    )


def train(
    shape: Shape, flops_per_token: float, tokens: float, steps: int, trained: int, dtype: DtypeName
) -> Work:
    """Steps of training that read so many tokens."""
    layers = TRAIN_NS * activation_bytes(dict(shape.raw))
    other = tokens * (layers + LOSS_NS * shape.vocab) + OPTIMIZER_NS * trained * steps
    return Work(flops_per_token * tokens, dtype, other)
