"""Reads a spec: YAML, dotted overrides, one line for each fault; its JSON Schema; and `--each`.

Relative paths inside a spec are relative to the current directory, not to the spec's file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs.errors import SpecErrors, StageFailed
from jobs.spec.job import JobSpec, rule_faults
from trainer.spec.errors import SpecReader
from trainer.spec.yaml import apply_override, dump, parse, quote

_READER = SpecReader(JobSpec, rule_faults)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a spec, for editors and other tools."""
    schema = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def spec_of(data: dict[Any, Any]) -> JobSpec:
    """Validate plain data (what YAML gives).

    Raises:
        SpecErrors: with one line for each fault, all at once.
    """
    spec, lines = _READER.read(data)
    if spec is None:
        raise SpecErrors(lines)
    return spec


def recipes() -> dict[str, Path]:
    """The bundled specs by name."""
    folder = Path(__file__).parents[1] / "recipes"
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
    data, faults = parse(text, str(file))
    if data is None and faults:
        raise SpecErrors(faults)
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {quote(data)}"
        raise SpecErrors([f"{file}: {what}; may be a mapping of keys, e.g. name: my-run"])
    for override in overrides:
        fault = apply_override(data, override)
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
    return dump(spec.model_dump())


FORM = "may be KEY=A,B,..., e.g. student.model=Qwen/Qwen3-0.6B,Qwen/Qwen3-1.7B"


def each_spec(spec: str, overrides: Sequence[str], each: str) -> list[JobSpec]:
    """A spec per value of `each` ("dotted.key=a,b,c"), its name with the value behind it.

    A value with commas of its own is written in YAML: "sweep.bits=[[8,4],[3]]". Raises SpecErrors
    with a line for every fault of every spec; a key or value at fault is named once.
    """
    key, equals, text = each.partition("=")
    if not (equals and key.strip() and text.strip()):
        raise SpecErrors([f"--each: got {each}; {FORM}"])
    values = _values(text)
    if not values or len(set(values)) < len(values):
        raise SpecErrors([f"--each: got {each}; {FORM}, each value once"])
    base = load_spec(spec, [*overrides, f"{key}={values[0]}"]).name
    suffixes = [slug(value) for value in values]
    if len(set(suffixes)) < len(suffixes):  # two folders of the same name
        suffixes = [f"{suffix}-{number}" for number, suffix in enumerate(suffixes, 1)]
    jobs, faults = [], []
    for value, suffix in zip(values, suffixes, strict=True):
        name = f"{base[: 62 - len(suffix)]}-{suffix}"
        try:
            jobs.append(load_spec(spec, [*overrides, f"{key}={value}", f"name={name}"]))
        except SpecErrors as error:
            faults += [fault for fault in error.faults if fault not in faults]
    if faults:
        raise SpecErrors(faults)
    return jobs


def run_each(jobs: Sequence[JobSpec], run: Callable[[JobSpec], int]) -> int:
    """Runs one after the other; one that fails is told and the others go on.

    Returns 0 if all are done. Raises the last StageFailed otherwise, and what else ends a command.
    """
    failed: StageFailed | None = None
    for number, job in enumerate(jobs, 1):
        print(f"run {number} of {len(jobs)}: {job.name}", flush=True)
        try:
            run(job)
        except StageFailed as error:
            failed = error
            print(f"error: {job.name}: {error.stage} failed: {error.why}", file=sys.stderr)
            print(f"log: {error.log}", file=sys.stderr)
    if failed is not None:
        raise failed
    return 0


def slug(value: str) -> str:
    """The end of a run's name: the last telling part of a value, e.g. qwen3-0.6b."""
    parts = [part for part in re.split(r"[/\\]", value) if part]
    last = parts[-1] if parts else value
    if last in ("student", "control") and len(parts) > 1:
        last = parts[-2]
    text = re.sub(r"[^a-z0-9._-]+", "-", Path(last).name.lower()).strip("-._")
    return text[:30].rstrip("-._") or "value"


def _values(text: str) -> list[str]:
    """The values of a list with commas; of one in YAML, its items in YAML."""
    if text.lstrip().startswith("["):
        try:
            items = yaml.safe_load(text)
        except yaml.YAMLError:
            return []
        return [item if isinstance(item, str) else json.dumps(item) for item in items]
    return [part.strip() for part in text.split(",") if part.strip()]
