"""Builds and publishes a run's report: index.html, table.md, results.json."""

from __future__ import annotations

from rich.console import Group

from cluster.storage import Attempt, Store
from jobs.report import formats, page, page_details, table
from jobs.report.rows import Row, cost, rows_of
from jobs.report.run_data import load_run


def build_report(run: Store | Attempt) -> list[Row]:
    """Publish `report/` of a run and return its rows (see `jobs.report.rows.collect`).

    Given an Attempt, it writes through it, so that an attempt that was superseded cannot publish.
    The same run directory gives the same bytes. Raises ValueError where the folder holds no run.
    """
    data = load_run(run.store if isinstance(run, Attempt) else run)
    rows = rows_of(data)
    spent = formats.cost_line(cost(data))
    run.write_json("report/results.json", {"format": 1, "rows": rows})
    text = table.markdown(rows, spent) + page_details.markdown(data)
    run.write_bytes("report/table.md", text.encode())
    run.write_bytes("report/index.html", page.page(data).encode())
    return rows


def show(runs: list[Store], width: int) -> Group:
    """The headline table of one or several runs for a terminal `width` columns wide, and costs.

    Reads the run directories and publishes nothing. Raises ValueError where a folder holds no run.
    """
    found = [load_run(run) for run in runs]
    rows = [row for data in found for row in rows_of(data)]
    lines = [formats.cost_line(cost(data)) for data in found]
    if len(found) > 1:
        lines = [f"{data.name}: {line}" for data, line in zip(found, lines, strict=True) if line]
    return table.terminal(rows, width, "\n".join(line for line in lines if line))
