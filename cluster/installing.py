"""Packages that Ray installs on nodes for a job: how long it may take, and why it failed."""

from __future__ import annotations

import math
import re

# Fields of Ray's runtime environment by which it installs packages, and its own limit for that.
_INSTALLERS = ("pip", "uv", "conda")
_LIMIT_S = 600.0


def install_seconds() -> float:
    """How long Ray may take to install this job's packages on a node; 0 if it installs none."""
    import ray

    environment = ray.get_runtime_context().runtime_env
    if not any(environment.get(kind) for kind in _INSTALLERS):
        return 0.0
    limit = float((environment.get("config") or {}).get("setup_timeout_seconds", _LIMIT_S))
    return limit if limit > 0 else math.inf  # -1: none


def not_installed(text: str) -> str | None:
    """The line that says why, of Ray's traceback with what pip printed; None for another text."""
    if "Failed to set up runtime environment" not in text:
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:")]
    why = (errors or lines)[-1].removeprefix("ERROR: ")
    node = re.search(r"\[Node ([^\]]+)\]", text)
    where = f"node {node[1]}" if node else "a node"
    return (
        f"packages could not be installed on {where}: {why[:300]} (all that was said is in "
        "runtime_env_setup-*.log among Ray's logs there)"
    )
