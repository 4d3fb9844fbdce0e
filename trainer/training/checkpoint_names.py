"""Names below a training's folder of checkpoints; without torch, for a driver looks there too."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

# What the training was made from, and what it gave once it was done.
INPUTS, DONE = "inputs.json", "done/metrics.json"
_RECORD = re.compile(r"\d{8}-\d{4}(-[0-9a-f]+)?\.json")


def new_token() -> str:
    """Tells the writers of one group from those of another of the same attempt.

    After a node is lost the group starts again within its attempt, and what was cut off may still
    be uploading.
    """
    return secrets.token_hex(3)


def name_of(step: int, attempt: int, token: str) -> str:
    """The name of what is saved after `step` steps: names sort by step, then by attempt."""
    return f"{step:08d}-{attempt:04d}-{token}"


def records(names: Iterable[str]) -> list[str]:
    """Of a folder's names the JSONs of complete checkpoints, oldest first."""
    return sorted(name for name in names if _RECORD.fullmatch(name))


def step_of(name: str) -> int:
    """The step that a name tells."""
    return int(name[:8])
