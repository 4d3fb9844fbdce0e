"""The tasks that a resolved spec asks for: its capture and its trainings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from cluster.storage import Store
from trainer.spec.rules import Sections
from trainer.stage_inputs import (
    CHECKPOINTS,
    TEXT_ALONE,
    learnt_data,
    needs_teacher,
    reads_cache,
    training_folders,
)
from trainer.teacher.job import Capture
from trainer.training.job import Training


def make_capture(
    spec: Sections,
    corpus: Store,
    cache: Store,
    *,
    batch_tokens: int | Literal["auto"],
    shard_seconds: float,
) -> Capture:
    """The capture of a resolved spec with a teacher."""
    assert spec.data is not None and spec.teacher is not None
    return Capture(
        teacher=spec.teacher,
        cache_spec=spec.cache,
        data=learnt_data(spec),
        distill=spec.distill if reads_cache(spec) else None,
        seed=spec.seed,
        batch_tokens=batch_tokens,
        shard_seconds=shard_seconds,
        corpus=corpus,
        cache=cache,
    )


def make_trainings(
    spec: Sections, inputs: Mapping[str, Any], run: Store, corpus: Store, cache: Store | None
) -> list[Training]:
    """The trainings of a resolved spec: the student's, then the control's.

    The control learns from the text alone, with the same steps in the same order. Checkpoints are
    kept apart by what the weights depend on, `inputs` (`training_inputs`).
    """
    assert spec.distill is not None and spec.data is not None
    jobs = []
    alone = {"mode": "cached", "losses": TEXT_ALONE}
    folders = training_folders(spec, inputs)
    for stage, role, distill in (
        ("distill", "student", spec.distill),
        ("control", "control", spec.distill.model_copy(update=alone)),
    ):
        if stage == "control" and not spec.distill.control:
            continue
        losses = distill.losses
        jobs.append(
            Training(
                stage=stage,
                teacher=spec.teacher if needs_teacher(spec.student, losses) else None,
                student=spec.student,
                distill=distill,
                data=learnt_data(spec),
                cache_spec=spec.cache,
                seed=spec.seed,
                corpus=corpus,
                cache=cache,
                checkpoints=run.sub(CHECKPOINTS, folders[stage]),
                output=run.sub(role),
                last=run.sub(f"{role}-last"),
                inputs=dict(inputs),
            )
        )
    return jobs
