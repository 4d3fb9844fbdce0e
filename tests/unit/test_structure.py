"""The layout of the four packages: imports run one way, without circles, and files stay small."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What each package may import of the others; `trainer` only the storage of `cluster`.
MAY_IMPORT = {
    "cluster": (),
    "trainer": ("cluster/storage",),
    "quant": ("cluster/storage", "trainer"),
    "jobs": ("cluster", "trainer", "quant"),
}
WINGS = tuple(MAY_IMPORT)
NO_RAY = ("trainer", "quant")
# Words of an earlier private language, each with the field's word for it in its place now.
PRIVATE = re.compile(
    r"(?i)(^|_)(beside|leftovers?|untouched|headed|foretold|foretell|drawing|wording|faultlines|"
    r"untaught|room|rooms|homeless|flights?|hear|everywhere|todo|material|beacon|patience|news|"
    r"logprobs?|land|given|strips?)(_|$)"
)
GRAPH = dict[str, dict[str, set[str]]]


def files() -> list[Path]:
    """All code of the packages."""
    return sorted(path for wing in WINGS for path in (ROOT / wing).rglob("*.py"))


def module_file(name: str) -> Path | None:
    """The file of a module of the project."""
    base = ROOT / name.replace(".", "/")
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def imports() -> Iterator[tuple[Path, Path]]:
    """(file, file that it imports), also inside functions and for types alone."""
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{a.name}" for a in node.names] + [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found = [module_file(name) for name in names if name.split(".")[0] in WINGS]
            if isinstance(node, ast.ImportFrom) and any(found[:-1]):
                found = found[:-1]  # modules of a package, not the package itself
            yield from ((path, other) for other in found if other is not None and other != path)


def siblings() -> GRAPH:
    """For every folder which of its files and subfolders import which, with all inside them."""
    graph: GRAPH = defaultdict(lambda: defaultdict(set))
    for path, other in imports():
        one, two = path.relative_to(ROOT).parts, other.relative_to(ROOT).parts
        same = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
        graph["/".join(one[:same])][one[same]].add(two[same])
    return graph


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle of a graph; [] without one."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        found = next((c for other in edges.get(node, ()) if (c := walk(other, [*way, node]))), [])
        done.add(node)
        return found

    return next((found for node in list(edges) if (found := walk(node, []))), [])


def test_no_files_and_no_folders_import_each_other_in_a_circle() -> None:
    found = {folder: circle(edges) for folder, edges in siblings().items()}
    assert {folder: names for folder, names in found.items() if names} == {}


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_run_against_the_data() -> None:
    wrong = []
    for path, other in imports():
        one, two = str(path.relative_to(ROOT)), str(other.relative_to(ROOT))
        wing = one.split("/")[0]
        allowed = (wing, *MAY_IMPORT[wing])
        if not any(two.startswith(f"{place}/") for place in allowed):
            wrong.append(f"{one} imports {two}")
    assert wrong == []


def test_training_and_quantizing_need_no_ray() -> None:
    for path in files():
        if path.relative_to(ROOT).parts[0] in NO_RAY:
            assert not re.search(r"^\s*(import|from) ray\b", path.read_text(), re.MULTILINE), path


def test_files_are_few_and_small() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in files()}
    code = {path: count for path, count in lines.items() if path.name != "__init__.py"}
    flat = [path for path in lines if path.parent.parent == ROOT]
    assert len(code) <= 290 and len(flat) <= 40
    assert len([path for path, count in code.items() if count < 60]) <= 30
    assert {path.name: count for path, count in lines.items() if count > 420} == {}


def test_names_are_the_fields() -> None:
    """Of files, classes, functions and methods."""
    found = [str(path.relative_to(ROOT)) for path in files() if PRIVATE.search(path.stem)]
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                words = "_".join(re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", node.name))
                if PRIVATE.search(words):
                    found.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert found == []
