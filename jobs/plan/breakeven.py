"""From how many students on a cache is cheaper than a teacher beside each of them."""

from __future__ import annotations

import math
from typing import Any

from jobs.plan.hours import Tokens, utilisation
from jobs.plan.needs import Models
from jobs.spec import JobSpec


def break_even(
    models: Models, spec: JobSpec, tokens: Tokens, cuda: bool, sharded: bool
) -> dict[str, Any]:
    """Compares teacher forward passes: once over what is captured, against over all that every
    student reads.

    Everything else (the students' own passes) is equal on both sides. A cache also holds records of
    the held-out parts. passes: how often a student reads a captured token on average. students:
    the smallest number from which the cache is cheaper; None where a student reads nothing twice
    and the teacher is as fast either way, so that it never is.
    """
    assert models.teacher is not None and spec.data is not None
    flops = models.teacher.forward_flops(spec.data.sequence_length)
    rate = {
        "cached": utilisation("capture", cuda, sharded),
        # In the student's micro-batches, between its passes, the teacher gets what training does.
        "online": utilisation("training", cuda, sharded),
    }
    once = flops * (tokens.captured + tokens.held_out) / rate["cached"]
    each = flops * tokens.read / rate["online"]
    return {
        "teacher_flops_per_token": flops,
        "cached_tokens": tokens.captured + tokens.held_out,
        "online_tokens_per_student": tokens.read,
        "passes": tokens.read / tokens.captured if tokens.captured else None,
        "students": math.floor(once / each) + 1 if each else None,
    }
