"""Replaces the `auto` values of a spec by what they stand for, once, before anything starts."""

from __future__ import annotations

from jobs.spec import JobSpec
from trainer import job


def resolve(spec: JobSpec) -> JobSpec:
    """The spec with `auto` resolved in `data` and `distill`; resources are left to the cluster."""
    return job.resolve(spec)
