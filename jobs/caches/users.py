"""Which runs use which logit cache, as their own files tell it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from cluster.storage import Store, read_events
from jobs.rundir import RunDir
from trainer.fingerprint import flatten
from trainer.spec.sections import CacheSpec


@dataclass(frozen=True)
class Run:
    """A run with a teacher.

    cache: the fingerprint of the cache that its capture stage has finished, if it has; filling:
    whether it is to capture, now or when it goes on; identity: of the cache that it captured;
    values: its spec, of any version.
    """

    name: str
    cache: str | None
    filling: bool
    identity: dict[str, Any]
    values: dict[str, Any]

    @property
    def teacher(self) -> str:
        """The last part of the teacher's name; for a run's student, the run's."""
        parts = PurePosixPath(str((self.values.get("teacher") or {}).get("model", ""))).parts
        if len(parts) > 1 and parts[-1] == "student":
            return parts[-2]
        return parts[-1] if parts else ""


def runs_in(storage: Store) -> list[Run]:
    """The runs of a storage that have a teacher."""
    return [run for name in storage.list() if name[:1] not in "_." for run in _run(storage, name)]


def users(cache: Store, identity: dict[str, Any], runs: list[Run]) -> list[Run]:
    """The runs that use a cache: those that captured it, and those that may still be filling it.

    Which cache an unfinished capture fills is not written down; it counts as a user unless its
    settings differ from the cache's identity.
    """
    return [
        run
        for run in runs
        if run.cache == cache.name or (run.filling and _may_fill(run.values, identity))
    ]


def _run(storage: Store, name: str) -> list[Run]:
    place = storage.sub(name)
    record = RunDir(place).record("capture")
    values = _spec_of(place)
    cache = None if record is None else record.outputs.get("cache")
    if not cache and not values.get("teacher"):
        return []
    identity = {} if record is None else record.inputs.get("fixed", {})
    return [Run(name, cache, record is None or not record.finished, identity, values)]


def _spec_of(place: Store) -> dict[str, Any]:
    """The spec that a run was last started with, {} if it cannot be read."""
    if place.exists("spec.yaml"):
        try:
            values = yaml.safe_load(place.read_text("spec.yaml"))
        except (yaml.YAMLError, UnicodeDecodeError):
            return {}
        return values if isinstance(values, dict) else {}
    # Under torchrun there is no spec.yaml; the events begin with it.
    started = [e for e in read_events(place) if e.get("event") == "run_start" and e.get("spec")]
    return started[-1]["spec"] if started else {}


def _may_fill(values: dict[str, Any], identity: dict[str, Any]) -> bool:
    asked = {
        "attention": (values.get("data") or {}).get("packing", "documents"),
    }
    dtype = (values.get("teacher") or {}).get("dtype", "auto")
    if dtype != "auto":  # else the nodes have not decided yet
        asked["teacher.dtype"] = dtype
    if "teacher.name" in identity:  # a hub id; local teachers are known by their weights alone
        asked["teacher.name"] = (values.get("teacher") or {}).get("model")
    with suppress(TypeError, ValueError):  # of another version, whose settings say nothing here
        asked |= flatten(CacheSpec(**(values.get("cache") or {})).identity(), "cache")
    return all(identity.get(name, value) == value for name, value in asked.items())
