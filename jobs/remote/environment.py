"""What Ray installs on the nodes for a job that is sent with `--environment lock`."""

from __future__ import annotations

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any

from jobs.load import dump_spec
from jobs.spec import JobSpec

_LOCK, _PROJECT = "requirements.lock", "pyproject.toml"
_DRIVERS = {"s3": "s3", "gs": "gcs", "abfs": "azure"}  # extras of the project, by URL
# Where Ray unpacks the checkout; pip puts the variable's value in.
_THERE = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"
# Wheels of CUDA are gigabytes; Ray's own limit is 10 minutes.
_INSTALL_S = 3600


def locked_environment(spec: JobSpec, root: Path) -> dict[str, Any]:
    """The fields of Ray's runtime environment, for a checkout in the folder `root`.

    Packages are those that the job imports, in the versions of the lock file, which has those of
    tests and benches as well. Ray itself stays the cluster's: a job that brings another one fails.
    """
    return {
        "pip": {"packages": requirements(spec, root), "pip_check": False},
        "config": {"setup_timeout_seconds": _INSTALL_S},
    }


def requirements(spec: JobSpec, root: Path) -> list[str]:
    """The lines of a requirements file."""
    project = tomllib.loads((root / _PROJECT).read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in _extras(spec):
        wanted += project["optional-dependencies"][extra]
    # Ray keeps an environment under a digest of these lines: that of the lock file is one of them.
    digest = hashlib.sha256((root / _LOCK).read_bytes()).hexdigest()
    lines = [f"--constraint {_THERE}/{_LOCK} # sha256 {digest}"]
    return lines + [each for each in wanted if re.split(r"[^\w-]", each, maxsplit=1)[0] != "ray"]


def _extras(spec: JobSpec) -> list[str]:
    text = dump_spec(spec)
    extras = [extra for scheme, extra in _DRIVERS.items() if f"{scheme}://" in text]
    return extras + ["tasks"] * (spec.sweep is not None and bool(spec.sweep.tasks))
