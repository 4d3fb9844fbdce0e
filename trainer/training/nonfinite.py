"""A training whose loss is no number any more: what its user is told before it ends.

Nothing is saved after such a step, so the newest checkpoint is of a step that was in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.training import checkpoint
from trainer.training.job import Training
from trainer.training.loader import MicroBatch
from trainer.worker import Worker

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from trainer.training.signals import OnlineTeacher

# Sequences that the message names; the event has all of them.
NAMED = 3


def is_finite(value: float | None) -> bool:
    """Whether a loss or a gradient norm is one; None is nothing to complain of."""
    return value is None or math.isfinite(value)


def norm_of(engine: DeepSpeedEngine) -> float | None:
    """The gradient norm of the engine's last step; DeepSpeed says -1 for one that is not finite."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        return None
    return float(norm) if float(norm) >= 0 else math.inf


def nonfinite_sequences(values: Tensor, micros: Sequence[tuple[bytes, ...]]) -> list[bytes]:
    """Keys of the sequences in micro-batches with values [micros, n] that are not finite."""
    finite = torch.isfinite(values).all(dim=1).tolist()
    return [key for keys, good in zip(micros, finite, strict=True) if not good for key in keys]


def nonfinite_signals(
    micros: Sequence[MicroBatch], online: OnlineTeacher | None, device: torch.device
) -> list[bytes]:
    """Keys of the sequences for which the teacher's own signal is not finite.

    With a teacher beside the student collective: it is asked once more.
    """
    found = []
    for micro in micros:
        wrong = torch.zeros(len(micro.labels), dtype=torch.bool)
        if online is not None:
            inputs = micro.to(device)
            with online.signal(inputs) as more:
                for states in [more.get("teacher_hidden"), *more.get("teacher_states", ())]:
                    if states is not None:
                        flat = states.reshape(len(wrong), -1)
                        wrong |= ~torch.isfinite(flat).all(dim=1).cpu()
        elif micro.log_probs is not None and micro.log_tail is not None:
            # Minus infinity is the log of a probability of 0.
            for values in (micro.log_probs, micro.log_tail.unsqueeze(1)):
                wrong |= (values.isnan() | (values == math.inf)).any(dim=1)
        counts = wrong & (micro.token_weights > 0)
        rows = counts.reshape(len(micro.input_ids), -1).any(dim=1).tolist()
        # Sequences that fill up come last, and have no key.
        found += [key for key, bad in zip(micro.keys, rows, strict=False) if bad]
    return found


def nonfinite_error(
    job: Training,
    worker: Worker,
    step: int,
    values: Mapping[str, float | None],
    bad: Sequence[bytes],
    teacher: Sequence[bytes] = (),
) -> FloatingPointError:
    """The error to raise, the same on all ranks, when one of `values` is no number; collective.

    step: in which it happened, from 1. bad: this rank's sequences in micro-batches whose loss is
    not finite, or all of the step where only the gradient norm is not; teacher: those for which
    the teacher's signal is not.
    """
    shares = worker.gather((list(bad), list(teacher)))
    keys = [key.hex() for share, _ in shares for key in share]
    untrue = [key.hex() for _, share in shares for key in share]
    found = checkpoint.newest(job.checkpoints, worker)
    worker.emit(
        "diverged",
        stage=job.stage,
        step=step,
        values={name: repr(value) for name, value in values.items()},
        sequences=keys,
        teacher_sequences=untrue,
        checkpoint=None if found is None else found.step,
    )
    if worker.is_main:
        worker.hooks.flush()
    wrong = {name: value for name, value in values.items() if not is_finite(value)}
    if len(wrong) > 1:  # the norm only follows the losses
        wrong.pop("grad_norm", None)
    said = ", ".join(f"{name} is {value:g}" for name, value in wrong.items())
    what = f"{job.stage}: {said} in step {step}"
    if untrue:
        what += f"; the teacher's own signal is not finite for {_some(untrue)}: "
        if job.distill.mode == "online":
            what += (
                "start over with teacher.dtype=float32 (--redo capture), or without them in "
                "data.train (--redo prepare)"
            )
        else:
            what += "capture them again with --redo capture"
    else:
        whole = set(wrong) == {"grad_norm"}
        if keys and whole:  # it is of all micro-batches of all ranks together
            what += f", with losses that are finite; the whole step read {_some(keys)}"
        elif keys:
            what += f", in micro-batches with {_some(keys)}"
        what += "; start over with a lower distill.learning_rate"
        if job.distill.dtype != "float32":
            what += " or distill.dtype=float32"
        what += " (--redo distill)" + (", or look at these sequences" if keys else "")
    if found is None:
        return FloatingPointError(f"{what}; no checkpoint had been saved")
    path = job.checkpoints.path(found.folder)
    return FloatingPointError(f"{what}; the checkpoint of step {found.step} is kept: {path}")


def _some(keys: Sequence[str]) -> str:
    """The first few keys."""
    more = len(keys) - NAMED
    word = "sequence" if len(keys) == 1 else "sequences"
    return f"{word} {', '.join(keys[:NAMED])}" + (f" and {more} more" if more > 0 else "")
