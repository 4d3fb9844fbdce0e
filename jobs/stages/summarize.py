"""summarize: the table, the page and the results file, from what the other stages published."""

from __future__ import annotations

from typing import Any

from jobs.report.build import build_report
from jobs.stages.base import Context
from trainer.fingerprint import fingerprint


def run(context: Context) -> dict[str, Any]:
    """Publishes report/; returns a fingerprint of its rows."""
    context.events.flush()
    rows = build_report(context.attempt)
    return {"rows": len(rows), "fingerprint": fingerprint(rows)}
