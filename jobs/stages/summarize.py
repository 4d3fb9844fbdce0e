"""summarize: the table, the page and the results file, from what the other stages published."""

from __future__ import annotations

from typing import Any

from cluster.spec import CellResources, WorkerResources
from cluster.storage.keys import fingerprint
from jobs.run.context import Context
from jobs.run.inputs import Outputs, ResolvedJob, StageInputs
from jobs.spec.job import JobSpec


def is_asked(spec: JobSpec) -> bool:
    """Every run ends with a report."""
    return True


def inputs(job: ResolvedJob, outputs: Outputs) -> StageInputs:
    """Everything that the report shows."""
    return StageInputs({}, {"outputs": fingerprint(outputs)})


def faults(job: ResolvedJob) -> list[str]:
    """None: it reads what the run itself has published."""
    return []


def resources(spec: JobSpec) -> dict[str, WorkerResources | CellResources]:
    """None: it works on the driver."""
    return {}


def run(context: Context) -> dict[str, Any]:
    """Publishes report/; returns a fingerprint of its rows."""
    from jobs.report.build import build_report

    context.events.flush()
    rows = build_report(context.attempt)
    return {"rows": len(rows), "fingerprint": fingerprint(rows)}


def reset(context: Context) -> None:
    """Nothing: the report is written anew whenever the stage runs."""


def remark(outputs: dict[str, Any]) -> str:
    """Nothing: the table follows."""
    return ""
