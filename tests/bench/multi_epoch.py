"""Training the demo's student in plain PyTorch on one of the signals, and measuring it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.bench.signals import SPECS, Teacher
from trainer.corpus.corpus import Batch, Part, next_tokens
from trainer.losses.divergences import CrossEntropy, ForwardKL, Loss, Target
from trainer.losses.fused_linear import fused_loss, head_of
from trainer.models.head import last_hidden
from trainer.models.load import build_model, new_config
from trainer.spec.sections import DistillSpec
from trainer.training.engine import learning_rate, make_optimizer

SEQUENCES = 16  # per optimizer step
LOSSES: dict[str, tuple[float, Loss]] = {
    "forward_kl": (1.0, ForwardKL()),
    "ce": (0.0, CrossEntropy()),
}


def new_student(spec: dict[str, Any], tokenizer: Any, length: int, seed: int) -> Any:
    """The demo's student with random weights, float32."""
    config = new_config("student.config", dict(spec["student"]["config"]), tokenizer, length)
    return build_model(folder=None, config=config, init="random", dtype=torch.float32, seed=seed)


def loss_sum(student: Any, vocab: int, batch: Batch, target: Target, hidden: Tensor) -> Tensor:
    """KL to the target, summed over the batch's loss tokens."""
    weights = torch.from_numpy(batch.loss_mask.reshape(-1))
    head = head_of(student, vocab)
    return fused_loss(hidden, head, target, weights, {"forward_kl": LOSSES["forward_kl"]})[0]


def states(student: Any, batch: Batch) -> Tensor:
    """The student's hidden states of a batch."""
    return last_hidden(
        student, torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    )


class Records:
    """A signal's records of the first `sequences` of a part, made in one pass of the teacher and
    kept in memory as a cache stores them; those that no cache stores are made anew each time."""

    def __init__(
        self, teacher: Teacher, part: Part, name: str, sequences: int, redraws: int = 1
    ) -> None:
        self.teacher, self.part, self.name = teacher, part, name
        self.sequences = sequences
        self.stored: list[list[bytes]] = [[] for _ in range(redraws)] if name in SPECS else []
        if not self.stored:
            return
        for start in range(0, sequences, SEQUENCES):
            batch = part.batch(np.arange(start, min(start + SEQUENCES, sequences)))
            log_p = teacher.log_probs(batch)
            for redraw, blobs in enumerate(self.stored):
                blobs += teacher.encoded(name, batch, log_p, redraw)

    def target(self, batch: Batch, numbers: Any, epoch: int) -> Target:
        """The target of the sequences `numbers`, which `batch` holds."""
        if not self.stored:
            log_p = self.teacher.log_probs(batch)
            return self.teacher.target(self.name, batch, log_p)
        blobs = self.stored[epoch % len(self.stored)]
        labels = torch.from_numpy(next_tokens(batch.input_ids).reshape(-1))
        return self.teacher.decoded(self.name, [blobs[i] for i in numbers], labels)


def train(
    student: Any,
    records: Records,
    settings: DistillSpec,
    epochs: int,
    seed: int,
    stop: int | None = None,
) -> None:
    """The demo's optimizer and schedule over `epochs` passes through the records, KL alone; ends
    early after `stop` steps."""
    part, vocab, sequences = records.part, records.teacher.vocab, records.sequences
    rng = np.random.default_rng(seed)
    per_epoch = sequences // SEQUENCES
    settings = settings.model_copy(update={"steps": per_epoch * epochs})
    optimizer = make_optimizer(student, settings)
    student.train()
    for step in range(min(settings.steps, stop or settings.steps)):
        epoch, at = divmod(step, per_epoch)
        if at == 0:
            order = rng.permutation(sequences)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        numbers = order[at * SEQUENCES : (at + 1) * SEQUENCES]
        batch = part.batch(numbers)
        target = records.target(batch, numbers, epoch)
        loss = loss_sum(student, vocab, batch, target, states(student, batch))
        optimizer.zero_grad()
        (loss / float(batch.loss_mask.sum())).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
        optimizer.step()


def evaluate(student: Any, teacher: Teacher, part: Part) -> dict[str, float]:
    """Means over a part's loss tokens: full KL to the teacher, cross-entropy with the text."""
    sums, tokens = torch.zeros(2, dtype=torch.float64), 0.0
    student.eval()
    with torch.no_grad():
        for start in range(0, len(part), SEQUENCES):
            batch = part.batch(np.arange(start, min(start + SEQUENCES, len(part))))
            target = teacher.target("full", batch, teacher.log_probs(batch))
            weights = torch.from_numpy(batch.loss_mask.reshape(-1))
            head = head_of(student, teacher.vocab)
            hidden = states(student, batch)
            sums += fused_loss(hidden, head, target, weights, LOSSES)[1]
            tokens += float(batch.loss_mask.sum())
    return {"kl": float(sums[0] / tokens), "ce": float(sums[1] / tokens)}
