"""What of a checkout travels to a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.working_dir import LIMIT_BYTES, TooLarge, check_size, checkout, stage, travelling


def test_sources_travel_and_what_is_private_or_large_by_nature_does_not(tmp_path: Path) -> None:
    kept = ["jobs/cli/main.py", "Makefile", "docs/img/a.svg", "environment.py", ".dockerignore"]
    left = [
        ".git/HEAD",
        ".venv/bin/python",
        "runs/demo/spec.yaml",
        "wandb/offline-run-1/x",
        "jobs/__pycache__/cli.cpython-311.pyc",
        ".mypy_cache/x",
        "stillhouse.egg-info/PKG-INFO",
        ".env",
        "deploy/.env.production",
        "keys/cluster.pem",
        ".netrc",
        "id_ed25519",
    ]
    for name in [*kept, *left]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = travelling(tmp_path)
    assert sorted(found) == sorted(kept)
    assert found["Makefile"] == len("Makefile")
    stage(tmp_path, list(found), tmp_path / "staged")
    assert (tmp_path / "staged" / "jobs" / "cli" / "main.py").read_text() == "jobs/cli/main.py"


def test_a_checkout_that_is_too_large_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    for name, size in (("big.bin", LIMIT_BYTES), ("model/weights.bin", 10**6), ("a.py", 10)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    with pytest.raises(TooLarge) as error:
        check_size(travelling(tmp_path), tmp_path)
    assert "101 MB" in str(error.value) and "\n" not in str(error.value)
    assert "big.bin (100 MB), model/weights.bin (1 MB)" in str(error.value)


def test_this_checkout_travels() -> None:
    root = checkout()
    files = travelling(root)
    assert {"jobs/cli/main.py", "cluster/working_dir.py", "requirements.lock"} <= set(files)
    assert check_size(files, root) < 20e6
