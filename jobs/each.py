"""`run --each KEY=A,B,C`: one run per value, on one corpus and one logit cache."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from jobs.errors import SpecErrors, StageFailed
from jobs.load import load_spec
from jobs.spec import JobSpec

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
