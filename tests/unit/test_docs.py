"""The README and docs name what exists: paths, make targets, commands, modules, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from jobs.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOP = ("jobs", "cluster", "trainer", "quant", "tests", "docs")


def named(pattern: str) -> Iterator[tuple[str, str]]:
    """(page, what the first group of a pattern matches on it)."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        yield from ((page.name, found) for found in re.findall(pattern, text))


def test_paths_exist() -> None:
    tops = "|".join(TOP)
    found = set(
        named(rf"(?<![\w/.<>-])((?:{tops})/[\w./-]*\w|Makefile|Dockerfile|pyproject\.toml)")
    )
    assert len(found) > 60
    assert [each for each in sorted(found) if not (ROOT / each[1]).exists()] == []


def test_modules_exist() -> None:
    found = set(named(r"python -m ((?:jobs|trainer|quant|cluster|tests)[\w.]*)"))
    found |= set(named(r"`((?:jobs|trainer|quant|cluster)\.[a-z_]+(?:\.[a-z_]+)+)`"))
    for page, name in found:
        base = ROOT / name.replace(".", "/")
        parent = base.parent
        known = [base.with_suffix(".py"), base / "__init__.py", parent.with_suffix(".py")]
        assert any(path.is_file() for path in known), f"{page}: {name}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = set(named(r"\bmake ([a-z][a-z-]+)\b(?=[`\s).,;:&]|$)"))
    code = {each for each in found if each[1] in targets or each[1].count("-")}
    assert len(code) > 5
    assert {name for _, name in code} <= targets


def test_commands_exist() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    found = set(named(r"(?:^|[`$ ])stillhouse ([a-z]+)\b"))
    assert len({name for _, name in found} & commands) > 10
    wrong = [each for each in sorted(found) if each[1] not in commands]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
