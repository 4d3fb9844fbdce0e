"""What the driver of a submitted job is told about that job, by its environment."""

from __future__ import annotations

import os

JOB = "STILLHOUSE_JOB"  # the id under which Ray knows it
TRIES_LEFT = "STILLHOUSE_TRIES_LEFT"


def job_of_driver() -> str | None:
    """The id of the Ray job that this process is the driver of; None at a terminal."""
    return os.environ.get(JOB)


def tries_left() -> int:
    """How often the run is started again if it fails now."""
    return int(os.environ.get(TRIES_LEFT, "0"))
