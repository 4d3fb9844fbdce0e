"""What Ray installs on nodes: held against what the checkout imports, against pip, and Ray."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from ray._private.runtime_env.pip import get_uri
from ray.runtime_env import RuntimeEnv

from jobs.spec.job import JobSpec
from jobs.spec.load import load_spec
from jobs.submit.submit import locked_environment, requirements
from tests.fixtures import small_job

ROOT = Path(__file__).resolve().parents[4]
# The cluster's own; of pydantic; only where the spec has tasks; the checkout.
NOT_ALWAYS = {"ray", "pydantic-core", "lm-eval", "stillhouse"}


def spec_of(folder: Path, **changes: Any) -> JobSpec:
    return load_spec(small_job.write_spec({**small_job.job_spec(folder), **changes}, folder))


def names(lines: list[str]) -> set[str]:
    found = {re.split(r"[^\w-]", line, maxsplit=1)[0] for line in lines if line[0] != "-"}
    return {name.lower().replace("_", "-") for name in found}


def test_it_has_every_package_that_the_checkout_imports(tmp_path: Path) -> None:
    imported = set()
    for package in ("jobs", "cluster", "trainer", "quant"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    imported.add(node.module.partition(".")[0])
    known = packages_distributions()
    wanted = {known[name][0].lower().replace("_", "-") for name in imported if name in known}
    found = names(requirements(spec_of(tmp_path), ROOT))
    assert wanted - found - NOT_ALWAYS == set()
    # Not the cluster's Ray, and nothing of tests and benches.
    assert not found & {"ray", "pytest", "trl", "llama-cpp-python", "lm-eval", "s3fs"}


@pytest.mark.parametrize(
    ("change", "package"),
    [
        ({"storage": "s3://bucket/runs"}, "s3fs"),
        ({"storage": "gs://bucket/runs"}, "gcsfs"),
        ({"storage": "abfs://bucket/runs"}, "adlfs"),
    ],
)
def test_storage_has_its_driver(tmp_path: Path, change: dict[str, Any], package: str) -> None:
    assert package not in names(requirements(spec_of(tmp_path), ROOT))
    assert package in names(requirements(spec_of(tmp_path, **change), ROOT))


def test_tasks_have_lm_eval(tmp_path: Path) -> None:
    spec = small_job.job_spec(tmp_path)
    found = requirements(spec_of(tmp_path, sweep={**spec["sweep"], "tasks": ["arc_easy"]}), ROOT)
    assert "lm-eval" in names(found)


def pip(lines: list[str], folder: Path, there: Path) -> subprocess.CompletedProcess[str]:
    """pip reads the lines, as Ray has it read them, where all packages are installed."""
    (folder / "lines.txt").write_text("".join(f"{line}\n" for line in lines))
    words = ["install", "--dry-run", "--no-index", "--no-deps", "-r", str(folder / "lines.txt")]
    variables = {**os.environ, "RAY_RUNTIME_ENV_CREATE_WORKING_DIR": str(there)}
    return subprocess.run(
        [sys.executable, "-m", "pip", *words], env=variables, capture_output=True, text=True
    )


def test_versions_are_those_of_the_lock_file_that_travels(tmp_path: Path) -> None:
    lines = requirements(spec_of(tmp_path), ROOT)
    done = pip(lines, tmp_path, ROOT)
    assert done.returncode == 0 and "Would install" not in done.stdout, done.stderr
    lock = (ROOT / "requirements.lock").read_text()
    (tmp_path / "requirements.lock").write_text(re.sub("^hqq==.*$", "hqq==0.0.1", lock, flags=re.M))
    done = pip(lines, tmp_path, tmp_path)
    assert done.returncode and "hqq==0.0.1" in done.stderr + done.stdout


def test_another_lock_file_is_another_environment(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    spec = spec_of(tmp_path)
    uris = [get_uri(RuntimeEnv(**locked_environment(spec, tmp_path))) for _ in range(2)]
    with open(tmp_path / "requirements.lock", "a") as lock:
        lock.write("other==1.0\n")
    assert uris[0] == uris[1] != get_uri(RuntimeEnv(**locked_environment(spec, tmp_path)))
