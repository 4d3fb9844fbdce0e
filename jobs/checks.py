"""Faults that only the world can tell: files, models, storage. Looked for before Ray starts."""

from __future__ import annotations

from functools import partial

from cluster.storage import open_store
from jobs.spec import JobSpec
from trainer.checks import faults_in, has_student, student_config, world_faults
from trainer.identity import Identities
from trainer.job import identities


def storage_faults(spec: JobSpec) -> list[str]:
    """Faults of the storage: unknown protocol, not writable."""
    return faults_in(lambda: open_store(spec.storage).check_writable(), "storage")


def spec_faults(spec: JobSpec, stages: list[str]) -> list[str]:
    """One line per fault of what the spec names, as far as the `stages` to run need it."""
    found = identities(spec)
    faults = world_faults(spec, found, set(stages) - {"summarize"})
    if "sweep" in stages and spec.sweep is not None and has_student(spec, found):
        for size in spec.sweep.group_size:
            faults += faults_in(partial(_group_size, spec, found, size), "sweep.group_size")
    return faults


def _group_size(spec: JobSpec, found: Identities, size: int) -> None:
    """A group size must divide every layer."""
    from quant.quantize import check_group_size

    check_group_size(student_config(spec, found), [size])
