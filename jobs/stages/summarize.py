"""summarize: the table, the page and the results file, from what the other stages published."""

from __future__ import annotations

from typing import Any

from cluster.storage.keys import fingerprint
from jobs.report import build_report
from jobs.run.context import Context


def run(context: Context) -> dict[str, Any]:
    """Publishes report/; returns a fingerprint of its rows."""
    context.events.flush()
    rows = build_report(context.attempt)
    return {"rows": len(rows), "fingerprint": fingerprint(rows)}
