"""What the targets of the Makefile install: read from it, pyproject.toml and the packages here."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()
FOR_TESTS = {"pytest", "pytest-xdist", "hypothesis", "moto", "jsonschema", "lm-eval"}
FOR_LINT = {"ruff", "mypy"}


def extras_of(level: str) -> list[str]:
    """The extras that the rule of a stamp (READY, TESTS, LINT, BENCHES) installs."""
    target = "install" if level == "READY" else rf"\$\({level}\)"
    rule = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert rule is not None
    (found,) = re.findall(r"--editable '\.\[([a-z0-9,]+)\]'", rule[1])
    return found.split(",")


def plain(requirement: str) -> tuple[str, list[str]]:
    """Name and extras of a requirement."""
    found = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement)
    assert found is not None
    return found[1].lower().replace("_", "-"), (found[2] or "").split(",")


def direct(extras: list[str]) -> set[str]:
    """What is asked for by name, where these extras are installed."""
    names: set[str] = set()
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    for name, inner in map(plain, wanted):
        names |= direct(inner) if name == "stillhouse" else {name}
    return names


def installed(extras: list[str]) -> set[str]:
    """That, and what it needs in turn, without extras of those."""
    found: set[str] = set()
    left = list(direct(extras))
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needs = requires(name) or []
        except PackageNotFoundError:  # of another level than this environment has
            continue
        left += [plain(line)[0] for line in needs if "extra ==" not in line]
    return found


def imports(folders: list[str]) -> set[str]:
    """Packages that the code of some folders imports, by the name they are installed by."""
    modules: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    known = packages_distributions()
    return {known[name][0].lower().replace("_", "-") for name in modules if name in known}


def test_setup_installs_nothing_of_tests_and_lint() -> None:
    found = installed(extras_of("READY"))
    assert {"torch", "transformers", "ray", "deepspeed", "s3fs"} <= found
    assert found & (FOR_TESTS - {"jsonschema"} | FOR_LINT) == set()  # ray needs jsonschema
    assert "lm-eval" not in found


@pytest.mark.parametrize(
    ("level", "target", "packages"),
    [
        ("TESTS", "test", FOR_TESTS),
        ("LINT", "check", FOR_LINT),
        ("BENCHES", "bench-quant", {"trl"}),
    ],
)
def test_a_target_installs_what_it_needs_beside_setup(
    level: str, target: str, packages: set[str]
) -> None:
    assert re.search(rf"^{target}: \$\({level}\) ", MAKEFILE, re.MULTILINE)
    assert re.search(rf"^\$\({level}\): \$\(READY\)$", MAKEFILE, re.MULTILINE)
    assert packages <= direct(extras_of(level))


def test_the_demo_needs_setup_alone() -> None:
    assert re.search(r"^demo: \$\(READY\) ", MAKEFILE, re.MULTILINE)
    needed = imports(["jobs", "cluster", "trainer", "quant"]) - {"stillhouse", "lm-eval"}
    assert needed - installed(extras_of("READY")) == set()


def test_tests_import_nothing_that_is_not_installed_for_them() -> None:
    needed = imports(["tests/unit", "tests/system", "tests/drill"]) - {"stillhouse"}
    there = installed(extras_of("READY") + extras_of("TESTS"))
    assert needed - there == set()


def test_the_lock_file_has_a_version_of_all_that_is_asked_for() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pinned = {plain(line)[0] for line in lock.splitlines() if "==" in line}
    levels = [
        extra for level in ("READY", "TESTS", "LINT", "BENCHES") for extra in extras_of(level)
    ]
    assert direct(levels) - pinned == set()
