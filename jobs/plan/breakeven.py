"""From how many students on a cache is cheaper than a teacher beside each of them."""

from __future__ import annotations

from typing import Any

from jobs.plan.hours import Tokens
from jobs.plan.needs import Models
from jobs.spec import JobSpec


def break_even(
    models: Models, spec: JobSpec, tokens: Tokens, flops_per_second: float | None
) -> dict[str, Any]:
    """Compares teacher forward passes: once over what is captured of train, against over all that
    every student reads.

    Everything else is equal on both sides: the students' own passes, and the records of the
    held-out parts. flops_per_second: what the teacher gets of all workers of a capture; None where
    that is not known. passes: how often a student reads a captured token on average. students: the
    smallest number from which the cache is cheaper, n read > captured.
    """
    assert models.teacher is not None and spec.data is not None
    flops = models.teacher.forward_flops(spec.data.sequence_length)

    def hours(count: int) -> float | None:
        return None if flops_per_second is None else flops * count / flops_per_second / 3600

    return {
        "teacher_flops_per_token": flops,
        "cached_tokens": tokens.captured,
        "online_tokens_per_student": tokens.read,
        "cached_teacher_hours": hours(tokens.captured),
        "online_teacher_hours_per_student": hours(tokens.read),
        "passes": tokens.read / tokens.captured,
        "students": tokens.captured // tokens.read + 1,
    }
