"""A short distillation of a quantized model whose codes stay as they are (see `trainable`).

It learns, by forward KL, from what the logit cache holds of the teacher, or from the 16-bit model
that it was made of, run beside it. One process, no DeepSpeed. The weights that did best on `select`
stay, and those it came with are among them: it is never worse there. Nothing is chosen on `report`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.storage import Store
from quant.evaluation.evaluate import evaluate
from quant.evaluation.measure import EvaluationData
from quant.evaluation.reference import open_reference
from quant.layers.linear import dense_weights
from quant.recovery.trainable import Trainable, trainable
from quant.spec import RecoverSpec
from trainer.corpus.corpus import Corpus, open_corpus
from trainer.corpus.schedule import Schedule, make_schedule
from trainer.losses.divergences import ForwardKL, Target
from trainer.losses.fused_linear import fused_loss
from trainer.models.head import check_head, head_of, last_hidden
from trainer.models.load import load_for_inference
from trainer.spec.sections import CacheSpec, DataSpec, DistillSpec
from trainer.training.engine import learning_rate
from trainer.training.loader import MicroBatch, Step, StepLoader, threads_for
from trainer.training.signals import CachedTeacher

AUTO_RATE = 5e-3  # log-scales, zero points in steps of the codes, and vectors alike
WARMUP, CLIP, BETAS = 0.05, 1.0, (0.9, 0.95)
EVALUATIONS = 8  # of the weights under way, evenly spaced; the last step is one of them
MICRO_TOKENS = 4096  # of a forward pass with gradients
METRICS = {"teacher": "kl_to_teacher", "student": "kl_to_reference"}


def recover(
    model: PreTrainedModel,
    spec: RecoverSpec,
    *,
    corpus: Store,
    cache: Store | None,
    cache_spec: CacheSpec | None,
    data: DataSpec | None,
    distill: DistillSpec | None,
    select: EvaluationData,
    reference_folder: str | None,
    vocab: int,
    seed: int,
    threads: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Recover a quantized model in place; what was done, as JSON.

    corpus, cache: those of the run. cache_spec, data, distill, seed: of its training, resolved;
    they say which records of the train part the cache holds (those of other runs do not count, for
    the result is to depend on this run alone). The seed is that of the recovery's order too.
    select: the part that the weights are chosen on. reference_folder: the 16-bit model that `model`
    was made of. vocab: ids that the tokenizer has. progress: called with the steps done and of all.

    Returns steps, seconds, tokens (that were learnt from), target, learning_rate, metric (what was
    measured on select: a mean KL in nats), select_before, select_after, best_step (0: as it came),
    evaluations, [{step, select, loss}] with the mean loss of the steps since the one before, and
    first_loss and last_loss, the first and the last of those.

    Raises ValueError, one line, where the target that was asked for is not there or the model
    cannot be recovered, and FloatingPointError (an ArithmeticError) for a loss that is no number.
    """
    torch.set_num_threads(threads)
    began = time.perf_counter()
    where = torch.device(device)
    opened = open_corpus(corpus)
    module: nn.Module = model  # whose `to` takes a device for mypy too
    module.to(where).eval()
    there = cache is not None and cache_spec is not None
    held = _captured(opened, data, distill, seed) if there else np.zeros(0, np.int64)
    target = _target(spec, len(held), len(opened.part("train")), reference_folder)
    signal: _Cached | _FromStudent
    if target == "teacher":
        assert cache is not None and cache_spec is not None
        signal = _Cached.open(cache, cache_spec, vocab, int(opened.manifest["sequence_length"]))
        indices = held
    else:
        assert reference_folder is not None
        signal = _FromStudent(load_for_inference(reference_folder, where, model.dtype), vocab)
        indices = np.arange(len(opened.part("train")))
    loader = _loader(opened, indices, signal.teacher, spec, seed, where)
    measure = _measure(select, signal.reference, reference_folder, vocab, where)
    with closing(loader), trainable(model) as parts:
        run = _Run(model, spec, parts, signal, vocab, where)
        with closing(loader.steps(0, spec.steps, threads=threads_for(cache))) as steps:
            found = run.run(steps, measure, progress)
    return {
        "steps": spec.steps,
        "target": target,
        "learning_rate": run.schedule.learning_rate,
        "metric": METRICS[target],
        **found,
        "seconds": time.perf_counter() - began,
    }


def _captured(
    corpus: Corpus, data: DataSpec | None, distill: DistillSpec | None, seed: int
) -> NDArray[np.int64]:
    """The sequences of the train part whose records this run's training read from the cache."""
    if data is None or distill is None or distill.mode == "online":
        return np.zeros(0, np.int64)
    if not distill.losses.of_distributions():
        return np.zeros(0, np.int64)
    return make_schedule(corpus, data, distill, seed).used()


def _target(spec: RecoverSpec, held: int, sequences: int, folder: str | None) -> str:
    """ "teacher" or "student". Raises ValueError, one line, where it is not there."""
    target = spec.target
    if target == "auto":
        target = "teacher" if held else "student"
    if target == "teacher" and not held:
        raise ValueError(
            "sweep.recover.target: teacher needs this run's records of the train part in a logit "
            "cache, and there are none; may be student, or auto"
        )
    if target == "student" and folder is None:
        raise ValueError("sweep.recover.target: student needs the 16-bit model, and there is none")
    if not sequences:
        raise ValueError(
            "sweep.recover: the train part has no sequences; add sources to data.train"
        )
    return target


@dataclass(frozen=True)
class _Cached:
    """The teacher's records of the train part: the first set of draws, for a loss at 1, which is
    what results are measured at, or at another temperature if the records have no tails for 1."""

    teacher: CachedTeacher
    temperature: float
    reference: None = None

    @staticmethod
    def open(cache: Store, spec: CacheSpec, vocab: int, length: int) -> _Cached:
        temperature = 1.0 if 1.0 in spec.temperatures else spec.temperatures[0]
        first = spec.model_copy(update={"redraws": 1})
        teacher = CachedTeacher.for_training(cache, first, vocab, length, temperature)
        return _Cached(teacher, temperature)

    def target(self, inputs: dict[str, Tensor | None]) -> Target:
        labels = inputs["labels"]
        assert labels is not None
        return Target(labels, inputs["ids"], inputs["log_probs"], inputs["log_tail"])


@dataclass(frozen=True)
class _FromStudent:
    """The 16-bit model, run on every batch: all of its distribution."""

    reference: PreTrainedModel
    vocab: int
    temperature: float = 1.0
    teacher: None = None

    @torch.no_grad()
    def target(self, inputs: dict[str, Tensor | None]) -> Target:
        labels, ids, positions = (inputs[n] for n in ("labels", "input_ids", "position_ids"))
        assert labels is not None and ids is not None and positions is not None
        hidden = last_hidden(self.reference, ids, positions)
        head = head_of(self.reference, self.vocab)
        return Target(labels, teacher_hidden=hidden, teacher_head=head)


class _Order:
    """Some sequences of a part, shuffled, epoch after epoch: a `trainer.training.loader.Order`."""

    def __init__(self, indices: NDArray[np.int64], spec: RecoverSpec, seed: int) -> None:
        self._indices = indices
        alike = np.zeros(len(indices), np.int16)
        self._schedule = Schedule(alike, [1.0], seed, spec.batch_sequences, spec.steps)

    def step_indices(self, step: int) -> NDArray[np.int64]:
        """Int64 [sequences per step], numbers in the part."""
        return self._indices[self._schedule.step_indices(step)]

    def step_epochs(self, step: int) -> NDArray[np.int64]:
        """Int64 [sequences per step]."""
        return self._schedule.step_epochs(step)


def _loader(
    corpus: Corpus,
    indices: NDArray[np.int64],
    teacher: CachedTeacher | None,
    spec: RecoverSpec,
    seed: int,
    device: torch.device,
) -> StepLoader:
    most = max(1, MICRO_TOKENS // int(corpus.manifest["sequence_length"]))
    return StepLoader(
        corpus.part("train"),
        _Order(indices, spec, seed),
        teacher,
        micro_batch=min(spec.batch_sequences, most),
        rank=0,
        world=1,
        pin=device if device.type == "cuda" else None,
    )


def _measure(
    select: EvaluationData,
    unquantized: PreTrainedModel | None,
    folder: str | None,
    vocab: int,
    device: torch.device,
) -> Callable[[PreTrainedModel], float]:
    """What gives a model's KL on `select` to what is learnt from, measured as a cell's is.

    unquantized: the 16-bit model in `folder`, None where the teacher's records are learnt. Where
    there are stored answers of it, it is not run again.
    """
    reference: Any = unquantized
    if unquantized is not None and select.reference is not None:
        assert folder is not None
        reference = open_reference(select.reference, folder, device, vocab)

    def measure(model: PreTrainedModel) -> float:
        records = None
        if reference is None:
            assert select.records is not None  # the cache that has those of train has them
            records = select.records()
        batches = select.batches()
        with dense_weights(model, model.dtype):
            found = evaluate(model, batches, reference, records, device, vocab=vocab)
        return float(found[METRICS["teacher" if reference is None else "student"]])

    return measure


class _Run:
    """The steps, and which weights did best."""

    def __init__(
        self,
        model: PreTrainedModel,
        spec: RecoverSpec,
        parts: Trainable,
        signal: _Cached | _FromStudent,
        vocab: int,
        device: torch.device,
    ) -> None:
        self.model, self.parts, self.signal = model, parts, signal
        self.vocab, self.device = vocab, device
        self.losses = {"forward_kl": (1.0, ForwardKL(signal.temperature))}
        rate = AUTO_RATE if spec.learning_rate == "auto" else spec.learning_rate
        # A training's own learning rates, for so many steps.
        self.schedule = DistillSpec(
            steps=spec.steps, learning_rate=rate, warmup_ratio=WARMUP, schedule="cosine"
        )
        self.optimizer = torch.optim.AdamW(
            parts.parameters(), lr=rate, betas=BETAS, weight_decay=0.0, fused=True
        )
        with torch.no_grad(), parts.gradients():
            check_head(model, vocab)

    def run(
        self,
        steps: Iterable[Step],
        measure: Callable[[PreTrainedModel], float],
        progress: Callable[[int, int], None],
    ) -> dict[str, Any]:
        """All steps; the model ends with the weights that did best."""
        count = self.schedule.steps
        due = {math.ceil(count * share / EVALUATIONS) for share in range(1, EVALUATIONS + 1)}
        before = best = measure(self.model)
        best_step, kept = 0, self.parts.stored()
        found: list[dict[str, Any]] = []
        losses: list[float] = []
        tokens = 0
        for step in steps:
            number = step.number + 1
            losses.append(self._step(step))
            tokens += step.tokens
            progress(number, count)
            if number not in due:
                continue
            try:
                value = measure(self.model)
            except FloatingPointError as error:
                raise self._diverged(f"on select {error}", number) from None
            found.append({"step": number, "select": value, "loss": sum(losses) / len(losses)})
            losses.clear()
            if value < best:
                best, best_step, kept = value, number, self.parts.stored()
        self.parts.put_back(kept)
        return {
            "tokens": tokens,
            "select_before": before,
            "select_after": best,
            "best_step": best_step,
            "first_loss": found[0]["loss"],
            "last_loss": found[-1]["loss"],
            "evaluations": found,
        }

    def _step(self, step: Step) -> float:
        """One step of the optimizer; the mean loss of its tokens, in nats."""
        self.optimizer.zero_grad()
        rate = learning_rate(self.schedule, step.number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        with self.parts.gradients():
            for micro in step.micros:
                # The loader's weights count on an engine that divides by the micro-batches.
                loss = self._loss(micro) / len(step.micros)
                loss.backward()
                total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], CLIP))
        if not (math.isfinite(total) and math.isfinite(norm)):
            what = f"the loss is {total:g} and its gradient's norm {norm:g}"
            raise self._diverged(what, step.number + 1)
        self.optimizer.step()
        self.parts.write()
        return total

    def _diverged(self, what: str, step: int) -> FloatingPointError:
        rate = self.schedule.learning_rate
        return FloatingPointError(
            f"recovery: {what} in step {step}; set sweep.recover.learning_rate below {rate:g}"
        )

    def _loss(self, micro: MicroBatch) -> Tensor:
        inputs = micro.to(self.device)
        ids, positions, weights = (
            inputs[n] for n in ("input_ids", "position_ids", "token_weights")
        )
        assert ids is not None and positions is not None and weights is not None
        target = self.signal.target(inputs)
        hidden = last_hidden(self.model, ids, positions)
        loss, _ = fused_loss(hidden, head_of(self.model, self.vocab), target, weights, self.losses)
        return loss
