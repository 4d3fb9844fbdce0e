"""Ray's own key-value store: wherever a process of the cluster runs, at no process of its own."""

from __future__ import annotations

from typing import Any


def store() -> Any:
    """Ray's module of it, imported when it is used first."""
    from ray.experimental import internal_kv

    return internal_kv
