"""The stages of a run, in order. Each module says all that there is to know of its stage."""

from __future__ import annotations

from typing import Any, Protocol

from cluster.spec import CellResources, WorkerResources
from jobs.run.context import Context
from jobs.run.inputs import Outputs, ResolvedJob, StageInputs
from jobs.spec.job import JobSpec
from jobs.stages import capture, distill, prepare, summarize, sweep


class Stage(Protocol):
    """What a module of this folder offers to the pipeline, which knows no stage by name."""

    def is_asked(self, spec: JobSpec) -> bool:
        """Whether a spec has this stage."""

    def inputs(self, job: ResolvedJob, outputs: Outputs) -> StageInputs:
        """What it is made from. outputs: of the stages before. Raises ValueError, one line."""

    def faults(self, job: ResolvedJob) -> list[str]:
        """One line per fault of what the spec names, as far as this stage needs it."""

    def resources(self, spec: JobSpec) -> dict[str, WorkerResources | CellResources]:
        """What it takes of a cluster, by the key below `resources`."""

    def run(self, context: Context) -> dict[str, Any]:
        """Does what is left to do; returns its outputs, as JSON."""

    def reset(self, context: Context) -> None:
        """Drops what it has made, so that `run` begins anew."""

    def remark(self, outputs: dict[str, Any]) -> str:
        """What a user is told of its outputs when it is done."""


STAGES: dict[str, Stage] = {
    "prepare": prepare,
    "capture": capture,
    "distill": distill,
    "sweep": sweep,
    "summarize": summarize,
}
