"""Which logit cache a command means: a path, a URL, the start of its fingerprint, or a spec's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.storage import Store, open_store
from cluster.storage.keys import fingerprint
from jobs.errors import SpecErrors
from jobs.forecast.dtypes import local_dtypes
from jobs.pipeline.skip import is_current
from jobs.run.directory import RunDir
from jobs.run.inputs import ResolvedJob
from jobs.spec.job import JobSpec
from jobs.spec.load import load_spec, recipes
from jobs.stages import prepare
from jobs.stages.capture import capture_of
from trainer.identity import Identities
from trainer.logits.store import IDENTITY, SHARDS
from trainer.resolve_auto import recorded_dtypes, resolve
from trainer.stage_inputs import CACHES, CORPORA, find_corpus, identities

if TYPE_CHECKING:
    from trainer.teacher.job import Capture

# Fewer characters of a fingerprint are taken for a mistake.
SHORTEST = 4
_START = re.compile(rf"[0-9a-f]{{{SHORTEST},32}}")


@dataclass(frozen=True)
class Asked:
    """A cache; where it was asked for by a spec also that spec, resolved, and what it is made of.

    `cache` of a spec need not be there yet.
    """

    cache: Store
    spec: JobSpec | None = None
    made_of: Identities | None = None

    @property
    def corpus(self) -> Store:
        """The corpus of the spec, which need not be there yet: of its run, if that has enough."""
        assert self.spec is not None and self.made_of is not None
        root = open_store(self.spec.storage)
        job = ResolvedJob(self.spec, self.made_of, root)
        record = RunDir(root.sub(self.spec.name)).record("prepare")
        if record is not None and is_current(record, prepare.inputs(job, {})):
            return root.sub(CORPORA, record.outputs["corpus"])
        identity = find_corpus(self.made_of, root) or self.made_of.corpus
        return root.sub(CORPORA, fingerprint(identity))

    @property
    def capture(self) -> Capture:
        """The capture (`trainer.teacher.job.Capture`) that fills the cache of the spec."""
        assert self.spec is not None
        return capture_of(self.spec, self.corpus, self.cache)


def caches_in(storage: Store) -> list[Store]:
    """The caches of a storage, by fingerprint."""
    folder = storage.sub(CACHES)
    return [cache for name in folder.list() if holds_cache(cache := folder.sub(name))]


def holds_cache(place: Store) -> bool:
    """Whether a folder is a logit cache, also one that has lost some of its files."""
    return place.exists(IDENTITY) or place.exists(SHARDS)


def storage_of(cache: Store) -> Store | None:
    """The storage that a cache belongs to; None for a folder that was copied elsewhere."""
    above, mark, _ = cache.url.rpartition(f"/{CACHES}/")
    return open_store(above) if mark and above else None


def find_cache(text: str, storage: str) -> Store:
    """The cache at a path or URL, or below `storage` by the start of its fingerprint.

    Raises:
        SpecErrors: there is none, or there are several; the line names those below `storage`.
    """
    root = open_store(storage)
    if "://" in text or Path(text).is_dir():
        place = open_store(text)
        if holds_cache(place):
            return place
    known = caches_in(root)
    if _START.fullmatch(text):
        found = [cache for cache in known if cache.name.startswith(text)]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(cache.name for cache in found)
            raise SpecErrors([f"{text}: several caches start so: {names}; give more characters"])
    names = ", ".join(cache.name[:12] for cache in known[:8])
    there = f"the caches in {storage} are {names}" if names else f"{storage} holds no caches"
    raise SpecErrors(
        [
            f"{text}: no such logit cache; {there}; may be its folder, a URL, or at least "
            f"{SHORTEST} characters of its fingerprint"
        ]
    )


def find(text: str, overrides: Sequence[str], storage: str) -> Asked:
    """The cache that `text` names: a spec's (file or bundled recipe), or as in `find_cache`.

    Raises:
        SpecErrors: as `load_spec` and `find_cache` do, or for a spec without a teacher.
    """
    if overrides or _is_spec(text):
        spec = load_spec(text, overrides)
        run = open_store(spec.storage).sub(spec.name)
        return of_spec(resolve(spec, {**local_dtypes(spec), **recorded_dtypes(run)}))
    return Asked(find_cache(text, storage))


def of_spec(spec: JobSpec) -> Asked:
    """The cache that a resolved spec fills. Raises SpecErrors if it has no teacher or no data."""
    for key in ("teacher", "data"):
        if getattr(spec, key) is None:
            raise SpecErrors([f"{key}: got null; needed here, as a spec without it has no cache"])
    made_of = identities(spec)
    cache = open_store(spec.storage).sub(CACHES, fingerprint(made_of.cache))
    return Asked(cache, spec, made_of)


def _is_spec(text: str) -> bool:
    if "://" in text or (Path(text).is_dir() and holds_cache(open_store(text))):
        return False
    return text.endswith((".yaml", ".yml")) or Path(text).is_file() or text in recipes()
