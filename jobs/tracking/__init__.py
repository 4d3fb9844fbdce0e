"""Weights & Biases as a projection of what a run directory says; see `jobs.tracking.launch`.

W&B never takes part in a job: a process of its own reads the run directory and writes to W&B, and
the job neither waits for it longer than a limit nor fails with it. So whatever W&B has can be
rebuilt at any time from the events, the cell results and the evaluations.
"""

from __future__ import annotations

from jobs.tracking.launch import Follower, project_run

__all__ = ["Follower", "project_run"]
