"""Figures of several kinds of processors stand side by side, and tables name theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import figures
from tests.bench.timing import NAMES, timings
from trainer.processor import cpu_kind

ROOT = Path(__file__).parents[3]


def test_each_kind_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("avx2", "amx"):
        monkeypatch.setattr(figures, "processor_kind", lambda device, kind=kind: kind)
        path = figures.result_file("speed", folder=tmp_path)
        assert figures.read_result(path) == {}
        figures.write_result(path, {"made_on": kind})
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.json")) == [
        "speed/amx.json",
        "speed/avx2.json",
    ]
    found = figures.results_by_kind("speed", tmp_path)
    assert found == {"amx": {"made_on": "amx"}, "avx2": {"made_on": "avx2"}}


def test_a_table_names_the_kinds_that_it_was_measured_on(tmp_path: Path) -> None:
    for kind, speed in (("amx", 9), ("avx2", 2), ("neon", 2)):
        result = {"speed": speed} | ({"extra": 1} if kind == "neon" else {})
        figures.write_result(tmp_path / "bench" / f"{kind}.json", result)
    tables = figures.tables_by_kind(
        "bench", lambda found: {name: f"| {value} |" for name, value in found.items()}, tmp_path
    )
    assert tables == {
        "speed": "On amx:\n\n| 9 |\n\nOn avx2, neon:\n\n| 2 |",
        "extra": "On neon:\n\n| 1 |",
    }


def test_all_figures_that_are_kept_are_filed_under_a_kind() -> None:
    for path in figures.FOLDER.rglob("*.json"):
        assert path.parent.parent == figures.FOLDER, path
        machine = json.loads(path.read_text())["machine"]
        assert machine.get("kind", path.stem) == path.stem, path


def test_the_tables_of_the_docs_are_those_of_the_figures(tmp_path: Path) -> None:
    """Each bench writes its page at its end; a page that was edited by hand differs."""
    from tests.bench import decoding, docs, kernels, quant_docs, sweep, train_docs

    for page, bench, tables in (
        (docs.PAGE, "cache", docs.cache_tables),
        (docs.PAGE, "cache_angle", docs.angle_tables),
        (quant_docs.PAGE, "quant", quant_docs.parts),
        (kernels.PAGE, "kernels", kernels.tables),
        (decoding.PAGE, "decoding", decoding.tables),
        (train_docs.PAGE, "train", train_docs.parts),
        (sweep.DOCS, "sweep", sweep.tables),
    ):
        copy = tmp_path / page.name
        copy.write_text(page.read_text())
        found = figures.tables_by_kind(bench, tables)
        docs.fill(copy, found)
        assert found and copy.read_text() == page.read_text(), f"{page.name}: {bench}"


def run(folder: Path, *arguments: str) -> int:
    """The command as make calls it, from a folder of its own."""
    command = [sys.executable, "-m", "tests.bench.timing", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment).returncode


def test_a_command_is_timed_where_it_did_all_of_the_work(tmp_path: Path) -> None:
    work = ["--begun", "begun", "--done", "done", "--size", "out", "--", "bash", "-c"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "large").write_bytes(bytes(3_000_000))

    def recorded() -> dict[str, float]:
        path = tmp_path / "runs" / "timings.json"
        return json.loads(path.read_text())[cpu_kind()] if path.exists() else {}

    assert run(tmp_path, "demo", *work, "touch begun; exit 3") == 3
    assert recorded() == {}
    assert run(tmp_path, "demo", *work, "true") == 0, "it only ends what was begun"
    assert recorded() == {}
    (tmp_path / "begun").unlink()
    assert run(tmp_path, "demo", *work, "touch begun done") == 0
    assert set(recorded()) == {"demo_s", "demo_mb"} and recorded()["demo_mb"] == 3
    assert run(tmp_path, "demo", *work, "true") == 0
    assert set(recorded()) == {"demo_s", "demo_mb", "again_s", "again_mb"}
    assert run(tmp_path, "test", "--", "true") == 0
    found = timings(tmp_path / "runs" / "timings.json")
    assert tuple(found) == NAMES
    assert found["install_s"] is None and found["install_mb"] is None
    assert found["demo_s"] == recorded()["demo_s"] and found["test_s"] is not None
