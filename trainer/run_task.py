"""Runs what a launcher asks of its ranks: stands above the tasks and what carries them out."""

from __future__ import annotations

from typing import Any

from trainer.responses.job import Answers, generate_answers
from trainer.teacher.job import Capture
from trainer.training.job import Training
from trainer.worker import Worker

Task = Answers | Capture | Training


def run_task(task: Task, worker: Worker) -> dict[str, Any]:
    """Carries out a task on the ranks of `worker` and returns its metrics; collective.

    Raises ValueError, one line, where something that the task names does not serve, and
    `trainer.worker.Stopped` after a clean stop.
    """
    # A rank imports only what its task needs: DeepSpeed and the rest take seconds.
    if isinstance(task, Capture):
        from trainer.teacher.capture import capture

        return capture(task, worker)
    if isinstance(task, Training):
        from trainer.training.loop import train

        return train(task, worker)
    return generate_answers(task, worker)
