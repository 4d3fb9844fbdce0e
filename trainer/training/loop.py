"""The training loop: a DeepSpeed engine over a fixed order of sequences, resumable at any step."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from trainer.corpus.corpus import Corpus, open_corpus
from trainer.spec.losses import WeightSchedule
from trainer.training import checkpoint
from trainer.training.best_weights import BestWeights
from trainer.training.checkpoint_names import INPUTS
from trainer.training.engine import learning_rate, make_losses
from trainer.training.evaluation import Evaluator, choice_metric, signal_of
from trainer.training.job import Training
from trainer.training.loader import Step, StepLoader, make_loader, read_ahead
from trainer.training.nonfinite import (
    is_finite,
    nonfinite_error,
    nonfinite_sequences,
    nonfinite_signals,
    norm_of,
)
from trainer.training.save_student import publish, read_done, student_state
from trainer.training.saver import Saver
from trainer.training.student import build
from trainer.worker import PeakMemory, Stopped, Worker

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from trainer.training.signals import OnlineTeacher

# Where steps take longer, they say how far they are, and hear a stop, so often.
BETWEEN_SECONDS = 5.0


def train(job: Training, worker: Worker) -> dict[str, Any]:
    """Trains, saves the student to `job.output`, returns its metrics; collective.

    Continues from the newest checkpoint. A training that is done already returns at once. Raises
    `Stopped` after a clean stop that the user asked for, FloatingPointError where a loss or the
    gradient norm is not finite.
    """
    done = worker.share(read_done(job) if worker.is_main else None)
    if done is not None:
        return dict(done)
    began, peak = time.monotonic(), PeakMemory(worker.device)
    corpus = open_corpus(job.corpus)
    patient = worker.patient_group()
    found = checkpoint.newest(job.checkpoints, worker)
    if worker.is_main:
        worker.hooks.fence()
        job.checkpoints.create(INPUTS, json.dumps(job.inputs, default=str).encode())
    with ExitStack() as open_now:
        loader = open_now.enter_context(closing(make_loader(job, worker, corpus)))
        # The first steps are read, and what reads them warms up, while the model is built.
        start = 0 if found is None else found.step
        steps = open_now.enter_context(closing(read_ahead(job, loader, start)))
        online = None
        if job.distill.mode == "online" and job.distill.losses.of_teacher():
            from trainer.training.signals import OnlineTeacher

            # Before the student, whose states are larger than anything that loading needs.
            vocab = int(corpus.manifest["vocab_size"])
            online = open_now.enter_context(closing(OnlineTeacher.load(job, vocab, worker)))
        run = _Run(job, worker, corpus, loader, online, patient=patient, began=began)
        open_now.enter_context(closing(run))
        run.resume(found)
        run.run(steps)
        metrics = {**run.finish(), "peak_bytes": peak.largest(worker)}
        publish(job, run.built, corpus, worker, metrics, run.bests, patient)
    worker.emit("training_done", stage=job.stage, metrics=metrics)
    return metrics


class _Run:
    """One rank's engine, data and counters."""

    def __init__(
        self,
        job: Training,
        worker: Worker,
        corpus: Corpus,
        loader: StepLoader,
        online: OnlineTeacher | None,
        *,
        patient: ProcessGroup | None,
        began: float,
    ) -> None:
        self.job, self.worker, self.online = job, worker, online
        self.patient = patient
        self.losses = make_losses(job.distill)
        self.hidden = "hidden" in job.distill.losses.used()
        self.accumulation = loader.accumulation(job.sequences_per_step)
        self.built = build(job, corpus, worker, loader.micro_batch, self.accumulation)
        self.engine = self.built.engine
        self.saver = Saver(job.checkpoints, worker, job.distill.keep_checkpoints, patient)
        self.bests = BestWeights(job.checkpoints, worker, patient)
        self.evaluator = Evaluator(job, worker, corpus, self.built, online)
        self.measured: dict[str, float] = {}
        self.start = 0
        self.tokens_read = 0
        self.began = began
        # Of the groups before this one, up to the checkpoint from which it goes on.
        self.seconds = self.worker_seconds = 0.0
        self.waits_ms: list[float] = []
        self.saved_step = 0
        self.spoke_at = 0.0
        self.step_seconds = math.inf  # of the last step, the same number on every rank
        self.saved_at = time.monotonic()
        # Of the checkpoints that were asked for out of turn; earlier groups of workers had theirs.
        self.saves_heeded = worker.hooks.saves_requested() if worker.is_main else 0

    def close(self) -> None:
        """Gives up what is under way, on this rank alone."""
        self.saver.close()
        self.bests.close()
        self.evaluator.close()

    def resume(self, found: checkpoint.Checkpoint | None) -> None:
        """Continues from the newest complete checkpoint, if there is one."""
        worker, job = self.worker, self.job
        pids = worker.gather(os.getpid())
        if found is None:
            worker.emit(
                "training_start",
                stage=job.stage,
                world=worker.world,
                pids=pids,
                parameters=self.built.parameters,
            )
            return
        checkpoint.load(self.engine, job.checkpoints, found, worker, self.patient)
        self.bests.restore(found.state.get("best"))
        self.start = self.saved_step = found.step
        self.tokens_read = int(found.state["tokens"])
        self.seconds = float(found.state["seconds"])
        self.worker_seconds = float(found.state["worker_seconds"])
        worker.emit(
            "resume",
            stage=job.stage,
            step=found.step,
            world=worker.world,
            saved_by=found.world,
            pids=pids,
        )

    def run(self, steps: Iterable[Step]) -> None:
        """The steps that are left, with evaluations and checkpoints on the way."""
        job, worker = self.job, self.worker
        self.engine.train()
        began = time.perf_counter()
        for step in steps:
            if step.number == self.start:
                began = time.perf_counter()  # the first batch is no part of the first step's time
            stop, due, uploaded = self._step(step, began)
            number = step.number + 1
            last = number == job.distill.steps
            if uploaded:
                self._complete()
            every = job.distill.evaluate_steps
            if last or (every is not None and number % int(every) == 0):
                self._evaluate(number, last)
            if not last and (stop or due):
                self._save(number)
            if stop and not last:
                self._finish_save()
                raise Stopped(f"{job.stage} stopped after step {number}")
            began = time.perf_counter()
        worker.barrier()

    def _step(self, step: Step, began: float) -> tuple[bool, bool, bool]:
        """One optimizer step; returns whether all ranks are to stop, are to save, have uploaded."""
        job, worker, engine = self.job, self.worker, self.engine
        # A generator per step, so dropout is the same after a resume as without one.
        torch.manual_seed(hash_seed(job.seed, step.number, worker.rank))
        rate = learning_rate(job.distill, step.number)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        weights = job.distill.losses.weights(step.number, job.distill.steps)
        values = self._micro_batches(step, weights)
        # Rank 0 decides for all; its word travels with the sums, at no further collective.
        flags = [
            worker.is_main and worker.hooks.stop_requested(),
            worker.is_main and self._checkpoint_due(step.number + 1),
            self.saver.done_here() and self.bests.done_here(),
            step.wait_s,
            time.perf_counter() - began,
        ]
        # From pinned memory, for any other copy would wait for the step to end.
        more = torch.tensor(flags, dtype=torch.float64, pin_memory=values.is_cuda)
        more = more.to(values.device, non_blocking=True)
        *sums, stop, save, uploads, wait_s, took_s = worker.sum(
            torch.cat([values.sum(dim=0), more])
        )
        self.step_seconds = took_s / worker.world
        # Undo the scale of the token weights: means over the global batch's loss tokens.
        unscale = 1.0 / (self.accumulation * worker.world)
        means = {name: value * unscale for name, value in zip(self._names(), sums, strict=True)}
        norm = norm_of(engine)
        if not all(map(is_finite, [*means.values(), norm])):
            bad = nonfinite_sequences(values, [micro.keys for micro in step.micros])
            if all(map(is_finite, means.values())):  # only the norm, which is the whole step's
                bad = [key for micro in step.micros for key in micro.keys]
            teacher = nonfinite_signals(step.micros, self.online, worker.device)
            self._diverged(step.number + 1, {**means, "grad_norm": norm}, bad, teacher)
        self.tokens_read += step.tokens
        self.waits_ms.append(1000 * wait_s / worker.world)
        changing = {
            f"weight_{name}": weights[name]
            for name, loss in job.distill.losses.used().items()
            if isinstance(loss.weight, WeightSchedule)
        }
        worker.emit(
            "step",
            stage=job.stage,
            step=step.number + 1,
            steps=job.distill.steps,
            loss=sum(weights[name] * value for name, value in means.items()),
            **means,
            **changing,
            learning_rate=rate,
            grad_norm=norm,
            tokens=self.tokens_read,
            tokens_per_s=step.tokens / (time.perf_counter() - began),
            loader_wait_ms=self.waits_ms[-1],
        )
        return stop > 0, save > 0, uploads == worker.world

    def _micro_batches(self, step: Step, weights: dict[str, float]) -> Tensor:
        """Forward and backward of a step; the losses' sums [micro-batches, losses], float64.

        They stay on the device, so that nothing waits for it within a step.
        """
        losses = {name: (weights[name], loss) for name, loss in self.losses.items()}
        how = {"hidden_weight": weights["hidden"]} if self.hidden else {}
        rows = []
        on_cpu = self.worker.device.type == "cpu"
        self.spoke_at = time.monotonic()
        for number, micro in enumerate(step.micros):
            if number and on_cpu and self.step_seconds >= BETWEEN_SECONDS:
                self._between(step, number)
            inputs = micro.to(self.worker.device)
            with signal_of(self.online, inputs) as more:
                loss, sums = self.engine(**inputs, losses=losses, **how, **more)
            self.engine.backward(loss)
            self.engine.step()
            rows.append(sums)
        return torch.stack(rows)

    def _between(self, step: Step, number: int) -> None:
        """Before the `number`-th micro-batch of a step, which may take minutes on CPUs: says how
        far it is, and stops where that is asked for; collective."""
        job, worker, of = self.job, self.worker, len(step.micros)
        due = worker.is_main and time.monotonic() - self.spoke_at >= BETWEEN_SECONDS
        if due:
            self.spoke_at = time.monotonic()
            worker.emit(
                "progress",
                stage=job.stage,
                done=step.number + number / of,
                total=job.distill.steps,
                unit="steps",
                within=f"{number} of {of} micro-batches",
            )
        (stop,) = worker.sum([due and worker.hooks.stop_requested()])
        if stop:
            if step.number > self.saved_step:  # what was read of this step is read again
                self._save(step.number)
            self._finish_save()
            raise Stopped(f"{job.stage} stopped in step {step.number + 1}")

    def _names(self) -> list[str]:
        return [*self.losses, *(["hidden"] if self.hidden else [])]

    def _diverged(self, step: int, values: dict[str, Any], *keys: list[bytes]) -> NoReturn:
        """Ends the training, and saves nothing more than was under way; collective."""
        with suppress(checkpoint.CheckpointFailed):  # then the one before it is the newest
            self._finish_save()
        raise nonfinite_error(self.job, self.worker, step, values, *keys)

    def _evaluate(self, step: int, last: bool) -> None:
        """Measures the student on `select`, and keeps its weights if they are the best so far."""
        self.measured = self.evaluator.measure(step)
        value = self.measured[choice_metric(self.job)]
        if not all(map(is_finite, self.measured.values())):
            self._diverged(step, self.measured, self.evaluator.bad)
        # The last weights are saved as they are.
        gather = None if last else lambda: student_state(self.built, self.worker.is_main)
        self.bests.offer(step, value, self.measured, gather)

    def _checkpoint_due(self, step: int) -> bool:
        spec = self.job.distill
        waited = time.monotonic() - self.saved_at
        # A slow upload puts off the next checkpoint by time, but not one that was asked for.
        by_time = not self.saver.busy and waited >= spec.checkpoint_minutes * 60
        asked = self.worker.hooks.saves_requested()
        if asked > self.saves_heeded:
            self.saves_heeded = asked
            return True
        return by_time or bool(spec.checkpoint_steps and step % spec.checkpoint_steps == 0)

    def _save(self, step: int) -> None:
        self._finish_save()  # one at a time
        job, worker = self.job, self.worker
        if worker.is_main:  # no checkpoint may be ahead of the steps that are recorded
            worker.hooks.flush()
        state = {"tokens": self.tokens_read, "best": self.bests.state(), **self._spent()}
        self.bests.begin()
        self.saver.begin(self.engine, step, job.distill.zero_stage, state)
        self.saved_step = step
        self.saved_at = time.monotonic()

    def _finish_save(self) -> None:
        """Waits for the checkpoint under way, if there is one."""
        if self.saver.busy:
            self._complete()

    def _complete(self) -> None:
        """Makes what was uploaded a checkpoint; first the weights that it names."""
        self.bests.complete()
        saved = self.saver.complete()
        if self.worker.is_main:
            with suppress(OSError):  # what is left over goes with the next one
                self.bests.prune()
        self.worker.emit(
            "checkpoint",
            stage=self.job.stage,
            step=saved.step,
            seconds=saved.held_s,
            upload_seconds=saved.upload_s,
            bytes=saved.bytes,
        )

    def _spent(self) -> dict[str, float]:
        """Seconds of this training by now, and the same times the workers that it had."""
        now = time.monotonic() - self.began
        return {
            "seconds": self.seconds + now,
            "worker_seconds": self.worker_seconds + now * self.worker.world,
        }

    def finish(self) -> dict[str, Any]:
        """The metrics of what was learnt; collective."""
        self._finish_save()
        best = self.bests.best
        assert best is not None, "the last step is always evaluated"
        return {
            **best.metrics,
            "best_step": best.step,
            **{f"last_{name}": value for name, value in self.measured.items()},
            "first_wait_ms": _mean(self.waits_ms[:1]),
            "loader_wait_ms": _mean(self.waits_ms[1:]),
            "steps": self.job.distill.steps,
            "tokens": self.tokens_read,
            "parameters": self.built.parameters,
            "world": self.worker.world,
            **self._spent(),
        }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def hash_seed(*parts: int) -> int:
    """A 63-bit seed from integers, the same in every process."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
