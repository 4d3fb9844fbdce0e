"""A job as its stages get it, and what they are made from: flat mappings that decide whether a
result still stands.

`fixed` inputs may not change under a finished stage (the run refuses, and shows the difference);
`growing` ones make the stage run again, adding what is missing; and so do `at_least` ones where
they ask for more than the stage has made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.storage import Store, open_store
from jobs.spec.job import JobSpec
from trainer.identity import Identities
from trainer.stage_inputs import identities

Outputs = dict[str, dict[str, Any]]


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
