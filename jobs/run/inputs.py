"""A job as its stages get it, and what they are made from: flat mappings that decide whether a
result still stands.

`fixed` inputs may not change under a finished stage (the run refuses, and shows the difference);
`growing` ones make the stage run again, adding what is missing; and so do `at_least` ones where
they ask for more than the stage has made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.storage import Store, open_store
from jobs.spec.job import JobSpec
from quant.spec import ExtraModel, Task
from trainer.identity import Identities
from trainer.models.load import absolute, find_model, identity
from trainer.stage_inputs import identities


def absolute_paths(spec: JobSpec) -> JobSpec:
    """The spec with its extra models and task folders named absolutely: workers run elsewhere."""
    sweep = spec.sweep
    if sweep is None or not (sweep.extra or sweep.tasks):
        return spec
    extra = [item.model_copy(update={"path": absolute(item.path)}) for item in sweep.extra]
    # The label is made of the path as it was written.
    extra = [
        item.model_copy(update={"name": before.label})
        for item, before in zip(extra, sweep.extra, strict=True)
    ]
    tasks = [
        task.model_copy(update={"folder": absolute(task.folder)}) if task.folder else task
        for task in sweep.tasks
    ]
    return spec.model_copy(
        update={"sweep": sweep.model_copy(update={"extra": extra, "tasks": tasks})}
    )


def extra_identity(extra: ExtraModel) -> dict[str, Any]:
    """What an extra model is: its name, and hashes of its config and weights.

    Raises ValueError, one line, if it is not there.
    """
    return {**identity(find_model("sweep.extra", extra.path), extra.path), "label": extra.label}


def task_identity(task: Task) -> dict[str, Any]:
    """A benchmark task: its settings, and the contents of its folder in the place of its name."""
    found = task.model_dump(exclude={"folder"})
    if task.folder is not None:
        digest = hashlib.blake2b(digest_size=16)
        root = Path(task.folder)
        for path in sorted(root.rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0")
                digest.update(path.read_bytes())
        found["content"] = digest.hexdigest()
    return found


Outputs = dict[str, dict[str, Any]]

# Part of every cell's fingerprint: raise it when the same inputs would give another result.
EVALUATION = 3


@dataclass(frozen=True)
class StageInputs:
    """See the module's docstring."""

    fixed: dict[str, Any]
    growing: dict[str, Any] = field(default_factory=dict)
    at_least: dict[str, int] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """As a finished stage is recorded with them."""
        found: dict[str, Any] = {"fixed": self.fixed, "growing": self.growing}
        return {**found, "at_least": self.at_least} if self.at_least else found

    def met_by(self, made_from: Mapping[str, Any]) -> bool:
        """Whether a stage that was made from such `values` has all that these ask for.

        A record of an earlier version says nothing of `at_least`: then everything was made.
        """
        if (made_from["fixed"], made_from["growing"]) != (self.fixed, self.growing):
            return False
        had = made_from.get("at_least", {})
        return all(had.get(key, number) >= number for key, number in self.at_least.items())


@dataclass(frozen=True)
class ResolvedJob:
    """A spec with its `auto` filled in, and what it names, found once and handed on.

    names: folders, configs and identities of models, corpus and cache; each is looked up when it is
    first asked for. storage: the root of `spec.storage`.
    """

    spec: JobSpec
    names: Identities
    storage: Store

    @classmethod
    def of(cls, spec: JobSpec, storage: Store | None = None) -> ResolvedJob:
        """Of a resolved spec. Raises ValueError for a storage that cannot be opened."""
        return cls(spec, identities(spec), open_store(spec.storage) if storage is None else storage)

    def with_spec(self, spec: JobSpec) -> ResolvedJob:
        """The same job with a spec that names the same models, tokenizer, data and cache."""
        return replace(self, spec=spec)
