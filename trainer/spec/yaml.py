"""YAML as specs are written: scalars of YAML 1.2, no key twice, dotted overrides, one-line faults.

Floors above and launchers read specs with the same functions, so they read the same.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode

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

    def compose_mapping_node(self, anchor: Any) -> MappingNode:  # noqa: ANN401
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

    def represent_sequence(self, tag: str, sequence: Iterable[Any], flow_style: Any = None) -> Any:  # noqa: ANN401
        node = super().represent_sequence(tag, sequence, flow_style)
        node.flow_style = all(isinstance(item, ScalarNode) for item in node.value)
        return node

    def represent_text(self, text: str) -> ScalarNode:
        # Other styles write such characters as they are, and readers take some for line ends.
        return self.represent_scalar(
            "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
        )

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.represent_text)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def quote(value: object) -> str:
    """`value` as it would stand in YAML, on one line, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)
    return text if len(text) <= 60 else text[:57] + "..."


def dump(data: object) -> str:
    """`data` as YAML, its keys in their order; `parse` gives it back."""
    return yaml.dump(
        data,
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


def parse(text: str, name: str) -> tuple[Any, list[str]]:
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


def _unshared(value: object) -> object:
    """A copy in which no part is there twice, as YAML aliases make it."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def apply_override(data: dict[Any, Any], override: str) -> str | None:
    """Set the key of `override` in `data`; the fault in one line, if there is one."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(re.fullmatch(r"[\w-]+", part) for part in parts):
        return f"override {quote(override)}: may be key=value, e.g. distill.steps=100"
    value, faults = parse(text, f"override {quote(override)}")
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
