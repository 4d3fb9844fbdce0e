"""Read a spec: YAML, dotted overrides, and one line for each thing that is wrong with it.

Relative paths inside a spec are relative to the current directory, not to the spec's file.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode

from jobs.errors import SpecErrors
from jobs.schema import quote, spec_of
from jobs.spec import JobSpec

_NULL, _BOOL, _INT, _FLOAT, _MERGE = (
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "merge")
)
# The scalars of YAML 1.2, where PyYAML has those of 1.1: there 1e-3 is text, 1:30 is ninety,
# "no" is false and 017 is fifteen.
_SCALARS: tuple[tuple[str, str, list[str]], ...] = (
    (_NULL, r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    (_BOOL, r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    (_INT, r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        _FLOAT,
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    (_MERGE, r"<<$", ["<"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[tuple[int, str, int]] = []

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                self.duplicates.append((line, key.value, first[key.value]))
            first.setdefault(key.value, line)
        return node


class _Dumper(yaml.SafeDumper):
    # Text that a reader of either version would take for something else is quoted.
    yaml_implicit_resolvers = copy.deepcopy(yaml.SafeDumper.yaml_implicit_resolvers)

    def represent_sequence(self, tag: str, sequence: Iterable[Any], flow_style: Any = None) -> Any:
        node = super().represent_sequence(tag, sequence, flow_style)
        node.flow_style = all(isinstance(item, ScalarNode) for item in node.value)
        return node

    def represent_text(self, text: str) -> ScalarNode:
        # Other styles write such characters as they are, and readers take some for line ends.
        return self.represent_scalar(
            "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
        )

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.represent_text)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def recipes() -> dict[str, Path]:
    """The bundled specs by name."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def find_spec(path: str | Path) -> Path:
    """The file of a spec: `path` itself, or the bundled recipe of that name.

    Raises:
        SpecErrors: there is neither; the line names what exists nearby.
    """
    file = Path(path)
    if file.is_file():
        return file
    bundled = recipes()
    if str(path) in bundled:
        return bundled[str(path)]
    if file.is_dir():
        inside = sorted(str(child) for child in file.glob("*.y*ml"))
        hint = f", e.g. {inside[0]}" if inside else ""
        raise SpecErrors([f"{path}: is a folder; may be a YAML file{hint}"])
    nearby = sorted(str(child) for child in file.parent.glob("*.y*ml"))
    here = f"there are {', '.join(nearby[:8])}" if nearby else "no YAML file is there"
    raise SpecErrors([f"{path}: no such file; {here}; bundled: {', '.join(bundled)}"])


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read, override and validate the spec at `path` (a YAML file, or a bundled recipe's name).

    Args:
        overrides: ``dotted.key=value`` pairs with YAML values, applied in order; parts that
            are numbers index lists (``data.train.0.weight=2``).

    Raises:
        SpecErrors: with one line for each fault, all at once.
    """
    file = find_spec(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise SpecErrors([f"{file}: cannot be read: {why}"]) from None
    data, faults = _parse(text, str(file))
    if data is None and faults:
        raise SpecErrors(faults)
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {quote(data)}"
        raise SpecErrors([f"{file}: {what}; may be a mapping of keys, e.g. name: my-run"])
    for override in overrides:
        fault = _apply(data, override)
        if fault:
            faults.append(fault)
    try:
        spec = spec_of(data)
    except SpecErrors as error:
        raise SpecErrors([*faults, *error.faults]) from None
    if faults:
        raise SpecErrors(faults)
    return spec


def dump_spec(spec: JobSpec) -> str:
    """`spec` as YAML with every key, in the order of the schema; loads back to an equal spec."""
    return yaml.dump(
        spec.model_dump(),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=96,
    )


def as_yaml(text: str) -> str:
    """`text` as a YAML scalar, quoted where it has to be."""
    line = yaml.dump(text, Dumper=_Dumper, allow_unicode=True, width=10**6)
    return line.removesuffix("\n").removesuffix("\n...")


def _parse(text: str, name: str) -> tuple[Any, list[str]]:
    """The data in `text` (None where it cannot be read), and the faults of its YAML."""
    try:
        loader = _Loader(text)
        data = loader.get_single_data()
        json.dumps(data, default=str, skipkeys=True)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark and not name.startswith("override") else name
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        return None, [f"{where}: not valid YAML: {why}"]
    except (ValueError, RecursionError):
        return None, [f"{name}: not valid YAML: a part contains itself, or a tag has no such value"]
    faults = [
        f"{name}:{line}: key {quote(key)} is there twice, first on line {first}; keep one of them"
        for line, key, first in loader.duplicates
    ]
    return _unshared(data), faults


def _unshared(value: Any) -> Any:
    """A copy in which no part is there twice, as YAML aliases make it."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _apply(data: dict[Any, Any], override: str) -> str | None:
    """Set the key of `override` in `data`; the fault in one line, if there is one."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(re.fullmatch(r"[\w-]+", part) for part in parts):
        return f"override {quote(override)}: may be key=value, e.g. distill.steps=100"
    value, faults = _parse(text, f"override {quote(override)}")
    if faults:
        return faults[0]
    at: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        here = ".".join(parts[:depth])
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                known = f"0 to {len(at) - 1}" if at else "none, it is empty"
                return f"override {quote(override)}: {here} has the entries {known}"
            step: Any = int(part)
        elif isinstance(at, dict):
            step = part
            if not last and at.get(step) is None:
                if parts[depth + 1].isdecimal():
                    whole = ".".join(parts[: depth + 1])
                    return f"override {quote(override)}: {whole} is not in the spec; give all of it"
                at[step] = {}
        else:
            return f"override {quote(override)}: {here} is {quote(at)}, which has no keys"
        if last:
            at[step] = value
        at = at[step]
    return None
