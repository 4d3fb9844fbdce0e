"""The report of a run: rows, the headline table, and a self-contained HTML page."""
