"""The report of a run: rows, the headline table, and a self-contained HTML page."""

from __future__ import annotations

from jobs.report.build import build_report, show
from jobs.report.recommend import Recommendation, recommend
from jobs.report.rows import collect, compare
from jobs.report.source import load_run
from jobs.report.table import markdown, terminal

__all__ = [
    "Recommendation",
    "build_report",
    "collect",
    "compare",
    "load_run",
    "markdown",
    "recommend",
    "show",
    "terminal",
]
