"""How well a student in training does on `select`."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trainer.corpus.corpus import Corpus
from trainer.losses.divergences import CrossEntropy, ForwardKL, Loss
from trainer.training.job import Training
from trainer.training.loader import Step, select_bytes, select_loader, threads_for
from trainer.training.nonfinite import is_finite, nonfinite_sequences
from trainer.training.student import Built
from trainer.worker import Worker

if TYPE_CHECKING:
    from trainer.training.signals import OnlineTeacher

# A rank's share of `select` stays in memory, with the teacher's records, up to so many bytes.
KEPT_BYTES = 256 << 20


def choice_metric(job: Training) -> str:
    """Which metric on `select` the best weights are chosen by; less is better.

    The KL to the teacher at temperature 1 where the teacher's distributions are learnt, else the
    cross-entropy. Never anything on `report`.
    """
    learnt = job.teacher is not None and job.distill.losses.of_distributions()
    return "select_forward_kl" if learnt else "select_ce"


def signal_of(
    online: OnlineTeacher | None, inputs: dict[str, Tensor | None]
) -> AbstractContextManager[dict[str, Any]]:
    """What a teacher beside the student, if there is one, adds to a forward pass of `inputs`."""
    return nullcontext({}) if online is None else online.signal(inputs)


class Evaluator:
    """Measures the student of a training on `select`, any number of times.

    The training goes on as if nothing had happened: nothing is drawn, and the engine is left in
    training mode. The teacher's distributions are those of the cache; without a cache `online`
    gives them, if they are learnt.
    """

    def __init__(
        self,
        job: Training,
        worker: Worker,
        corpus: Corpus,
        built: Built,
        online: OnlineTeacher | None = None,
    ) -> None:
        self._job, self._worker, self._built = job, worker, built
        self._loader = select_loader(job, worker, corpus, built.micro_batch)
        self._online = None
        if job.cache is None and job.distill.losses.of_distributions():
            self._online = online
        self._losses: dict[str, tuple[float, Loss]] = {"ce": (1.0, CrossEntropy())}
        if self._loader.teacher is not None or self._online is not None:
            self._losses["forward_kl"] = (1.0, ForwardKL())
        self._keeps = select_bytes(job, self._loader) <= KEPT_BYTES
        self._kept: list[Step] = []
        self.bad: list[bytes] = []

    def measure(self, step: int) -> dict[str, float]:
        """Means over the loss tokens of `select` after `step` steps; collective.

        select_ce, select_perplexity and, with a teacher, select_forward_kl: the KL of the teacher
        to the student, at temperature 1. Emits an event `evaluation`, unless one of them is not
        finite; `bad` then has the keys of this rank's sequences in the micro-batches at fault.
        """
        began = time.perf_counter()
        worker, engine = self._worker, self._built.engine
        values: list[Tensor] = []
        keys: list[tuple[bytes, ...]] = []
        tokens = 0
        engine.eval()
        with torch.no_grad(), closing(self._steps()) as steps:
            for one in steps:
                (micro,) = one.micros
                inputs = micro.to(worker.device)
                with signal_of(self._online, inputs) as more:
                    more.pop("teacher_states", None)  # hidden states are not measured
                    _, sums = engine(**inputs, losses=self._losses, **more)
                values.append(sums[: len(self._losses)])
                keys.append(micro.keys)
                tokens = one.tokens
        engine.train()
        sums_all = worker.sum(torch.stack(values).sum(dim=0))
        means = {
            f"select_{name}": value / tokens
            for name, value in zip(self._losses, sums_all, strict=True)
        }
        if not all(map(is_finite, means.values())):
            self.bad = nonfinite_sequences(torch.stack(values), keys)
            return means
        means["select_perplexity"] = float(np.exp(means["select_ce"]))
        worker.emit(
            "evaluation",
            stage=self._job.stage,
            step=step,
            **means,
            seconds=time.perf_counter() - began,
        )
        return means

    def _steps(self) -> Generator[Step]:
        if self._kept:
            yield from self._kept
            return
        kept = []
        threads = threads_for(self._job.cache)
        with closing(self._loader.steps(ahead=threads + 1, threads=threads)) as steps:
            for step in steps:
                if self._keeps:
                    kept.append(step)
                yield step
        self._kept = kept

    def close(self) -> None:
        """Closes what it reads from."""
        self._loader.close()
