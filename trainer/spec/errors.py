"""What does not fit a spec, one line for each: the key, what it got, and what it may be.

Launchers that read other sections of a spec say the same of those they share.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from trainer.spec.yaml import quote

Node = dict[str, Any]
KeyPath = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


class SpecReader(Generic[Model]):
    """Reads plain data as `model`, and says in lines what of it does not fit.

    rules(spec, at_fault): the faults against the rules across sections, without those that read
    one of the dotted keys `at_fault`; `spec` may lack what is at fault.
    """

    def __init__(
        self, model: type[Model], rules: Callable[[Any, Iterable[str]], list[str]]
    ) -> None:
        self.model, self._rules = model, rules

    def read(self, data: dict[Any, Any]) -> tuple[Model | None, list[str]]:
        """The spec in `data` (what YAML gives), and a line for each fault, all at once."""
        lines = {path: self._expected(path, True) for path in self._truths(data, ())}
        try:
            spec = self.model.model_validate(data)
        except ValidationError as error:
            details = error.errors(include_url=False)
            if details[0]["type"] == "rules":
                return None, [*self._in_order(lines), *details[0]["ctx"]["text"].split("\n")]
            paths = [_path(data, detail["loc"], detail["type"]) for detail in details]
            for path, detail in zip(paths, details, strict=True):
                path = path or detail["loc"]
                # Of a section that is one of several kinds, what is wrong inside says more.
                if path == detail["loc"] or not any(_inside(other, path) for other in paths):
                    lines.setdefault(path, self._line(path, detail, _value(data, path)))
            return None, [*self._in_order(lines), *self._rules_around(data, list(lines))]
        if lines:
            return None, self._in_order(lines)
        return spec, []

    def may_be(self, path: KeyPath) -> str:
        """What may stand at `path`, in words: ``auto or a whole number from 1``."""
        return self._words(self.node_at(path))

    def node_at(self, path: KeyPath) -> Node:
        """The part of the schema that describes `path`; {} (anything) where it is silent."""
        node = self._root
        for step in path:
            if isinstance(step, int):
                array = self._variant(node, "array")
                items = array.get("prefixItems")
                node = items[step] if items and step < len(items) else array.get("items", {})
            else:
                found = [_of_section(section, step) for section in self._objects(node)]
                node = next((child for child in found if child), {})
            node = self._resolve(node)
        return node

    def keys_of(self, path: KeyPath) -> list[str]:
        """The keys that the section at `path` knows; [] where it takes any, or is no section."""
        sections = self._objects(self.node_at(path))
        return list(dict.fromkeys(key for section in sections for key in _keys(section)))

    def nearest(self, path: KeyPath) -> str:
        """``did you mean ...?`` for the unknown key at `path`, or the keys that may stand there."""
        section, key = path[:-1], str(path[-1])
        known = self.keys_of(section)
        prefix = ".".join(map(str, section)) + "." if section else ""
        found = [prefix + name for name in difflib.get_close_matches(key, known, n=1, cutoff=0.7)]
        # Right key, wrong section: the most common slip after a misspelling.
        same = [dotted for dotted, name in self._all_keys if name == key and dotted not in found]
        inside = [dotted for dotted in same if prefix and dotted.startswith(prefix)]
        found += inside or same
        if not found:
            names = sorted({name for _, name in self._all_keys})
            close = difflib.get_close_matches(key, names, n=2, cutoff=0.8)
            found = [dotted for name in close for dotted, last in self._all_keys if last == name]
        if found:
            return f"did you mean {_listed(found[:3])}?"
        return f"may be {_listed(known)}"

    @cached_property
    def _root(self) -> Node:
        return self.model.model_json_schema()

    @cached_property
    def _all_keys(self) -> tuple[tuple[str, str], ...]:
        """(dotted key, its last part) of every key; entries of lists are written as index 0."""

        def walk(node: Node, prefix: str) -> Iterator[tuple[str, str]]:
            children = [child for section in self._objects(node) for child in _properties(section)]
            for name, child in children:
                yield prefix + name, name
                child = self._resolve(child)
                yield from walk(child, f"{prefix}{name}.")
                items = self._variant(child, "array").get("items")
                if items:
                    yield from walk(self._resolve(items), f"{prefix}{name}.0.")

        return tuple(walk(self._root, ""))

    def _resolve(self, node: Node) -> Node:
        """`node` with its reference followed."""
        while "$ref" in node:
            node = self._root["$defs"][node["$ref"].rsplit("/", 1)[1]]
        return node

    def _variants(self, node: Node) -> list[Node]:
        """The alternatives of `node`, references followed."""
        options = node.get("anyOf") or node.get("oneOf")
        if not options:
            return [node]
        return [variant for option in options for variant in self._variants(self._resolve(option))]

    def _variant(self, node: Node, kind: str) -> Node:
        return next((option for option in self._variants(node) if option.get("type") == kind), {})

    def _objects(self, node: Node) -> list[Node]:
        return [option for option in self._variants(node) if option.get("type") == "object"]

    def _words(self, node: Node) -> str:
        options = self._variants(node)
        return _listed([self._option(option) for option in options])

    def _option(self, node: Node) -> str:
        if "const" in node:
            return _plain(node["const"])
        if "enum" in node:
            return _listed([_plain(value) for value in node["enum"]])
        kind = node.get("type")
        if kind in ("integer", "number"):
            return ("a whole number" if kind == "integer" else "a number") + _bounds(node)
        if kind == "array":
            items = node.get("prefixItems")
            if items:
                return f"a list of {len(items)}, each {self._words(self._resolve(items[0]))}"
            size = "not empty, " if node.get("minItems") else ""
            return f"a list, {size}each {self._words(self._resolve(node.get('items', {})))}"
        if kind == "object":
            known = _keys(node)
            shown = known if len(known) <= 5 else [*known[:4], "..."]
            return f"a section ({', '.join(shown)})" if known else "a section"
        if kind == "string":
            example = f", e.g. {node['examples'][0]}" if node.get("examples") else ""
            return ("text, not empty" if node.get("minLength") else "text") + example
        return {"boolean": "true or false", "null": "null"}.get(str(kind), "any value")

    def _in_order(self, lines: dict[KeyPath, str]) -> list[str]:
        """The lines by section, in the order of the schema; keys of no section come last."""
        place = {name: index for index, name in enumerate(self.model.model_fields)}
        return [lines[path] for path in sorted(lines, key=lambda path: place.get(str(path[0]), 99))]

    def _truths(self, value: object, path: KeyPath) -> Iterator[KeyPath]:
        """Paths where true or false stands for a number (which Python would take for 1 or 0)."""
        if isinstance(value, bool):
            kinds = {option.get("type") for option in self._variants(self.node_at(path))}
            if kinds & {"integer", "number"} and "boolean" not in kinds:
                yield path
            return
        if isinstance(value, (dict, list)):
            for step, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from self._truths(item, (*path, step))

    def _line(self, path: KeyPath, detail: Any, got: object) -> str:  # noqa: ANN401
        """The one line for an error of pydantic."""
        kind, location = detail["type"], detail["loc"]
        key = ".".join(map(str, path))
        if kind in ("extra_forbidden", "invalid_key") or location[-1:] == ("[key]",):
            if path[-1] in self.keys_of(path[:-1]):  # of a section that is one of several kinds
                section = ".".join(map(str, path[:-1]))
                kinds = self.may_be(path[:-1])
                return f"{key}: is not for these keys beside it; {section} may be {kinds}"
            return f"{key}: unknown key; {self.nearest(path)}"
        if kind == "missing" and path[-1:] == location[-1:]:
            return f"{key}: missing; may be {self.may_be(path)}"
        if kind == "at_key":
            return f"{key}.{detail['ctx']['key']}: {detail['ctx']['why']}"
        if kind == "value_error":
            why = detail["ctx"]["error"]
            return f"{key}: {why}" if isinstance(got, dict) else f"{key}: got {quote(got)}; {why}"
        return self._expected(path, got)

    def _expected(self, path: KeyPath, got: object) -> str:
        words = self.may_be(path)
        if "text" in words and isinstance(got, (bool, int, float)):
            words += " (put it in quotes)"
        return f"{'.'.join(map(str, path))}: got {quote(got)}; may be {words}"

    def _rules_around(self, data: dict[Any, Any], at_fault: Sequence[KeyPath]) -> list[str]:
        """Faults against the rules across sections, judged on the sections that are sound.

        Keys at fault are dropped for it; a section that does not hold without them is at fault
        as a whole.
        """
        rest = copy.deepcopy(data)
        for path in at_fault:
            while path and isinstance(path[-1], int):
                path = path[:-1]
            parent: Any = rest
            for step in path[:-1]:
                parent = parent.get(step, {}) if isinstance(parent, dict) else parent[step]
            if path and isinstance(parent, dict):
                parent.pop(path[-1], None)
        bad = {".".join(map(str, path)) for path in at_fault}
        sections: dict[str, Any] = {}
        for name, field in self.model.model_fields.items():
            annotation: Any = field.annotation
            try:
                if name in rest:
                    sections[name] = TypeAdapter[Any](annotation).validate_python(rest[name])
            except ValidationError:
                bad.add(name)
        return self._rules(self.model.model_construct(None, **sections), bad)


def _properties(section: Node) -> list[tuple[str, Node]]:
    return list(section.get("properties", {}).items())


def _keys(section: Node) -> list[str]:
    return list(section.get("properties", section.get("propertyNames", {}).get("enum", [])))


def _of_section(section: Node, key: str) -> Node:
    """What may stand under `key` of a section; {} where the schema is silent."""
    extra = section.get("additionalProperties")
    child: Node = section.get("properties", {}).get(key) or (
        extra if isinstance(extra, dict) else {}
    )
    return child


def _bounds(node: Node) -> str:
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    text = ""
    if low is not None:
        text += f" from {low}"
    if above is not None:
        text += f" above {above}"
    if high is not None:
        text += f" to {high}"
    if below is not None:
        text += f"{' to' if text else ''} below {below}"
    return text


def _plain(value: Any) -> str:  # noqa: ANN401
    return value if isinstance(value, str) else quote(value)


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _path(data: Any, location: Sequence[str | int], kind: str) -> KeyPath:  # noqa: ANN401
    """pydantic's location without what is no key (the tags of unions)."""
    path: list[str | int] = []
    for index, step in enumerate(location):
        known: Any = data if isinstance(data, dict) else ()
        if isinstance(data, list):
            known = range(len(data))
        if step in known:
            data = data[int(step) if isinstance(data, list) else step]
            path.append(step)
        elif index == len(location) - 1 and isinstance(data, dict) and kind == "missing":
            path.append(step)
    return tuple(path)


def _inside(path: KeyPath, of: KeyPath) -> bool:
    return len(path) > len(of) and path[: len(of)] == of


def _value(data: Any, path: KeyPath) -> Any:  # noqa: ANN401
    for step in path:
        data = data.get(step) if isinstance(data, dict) else data[int(step)]
    return data
