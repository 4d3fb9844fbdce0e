"""What a logit cache holds, how much of it a spec will read, and which runs use it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cluster.storage import Store, read_events
from cluster.storage.keys import flatten
from jobs.caches.find import Asked
from jobs.run.directory import RunDir
from trainer.logits.index import kind_of
from trainer.logits.reader import CacheReader
from trainer.logits.records import VERSION, Coding, Records
from trainer.logits.store import (
    IDENTITY,
    SHARDS,
    CacheDamaged,
    command,
    list_shards,
    read_codebook,
    read_identity,
)
from trainer.spec.sections import CacheSpec

# Lower ends of the bins of a histogram: of retained mass, and of unique ids per position.
MASSES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
UNIQUES = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513, 1025, 2049, 4097)


@dataclass(frozen=True)
class Histogram:
    """Shares of positions by bin. what: "retained mass" or "unique ids"; edges: lower ends."""

    what: str
    edges: tuple[float, ...]
    shares: tuple[float, ...]
    mean: float
    positions: int


@dataclass(frozen=True)
class Kind:
    """The records of one kind.

    bytes: of records and indexes. tokens: by the lengths of the sequences looked at, of which
    there are `seen`; exact unless those differ.
    """

    kind: str
    sequences: int
    shards: int
    bytes: int
    tokens: int = 0
    tokens_exact: bool = True
    seen: int = 0
    histogram: Histogram | None = None

    @property
    def bytes_per_token(self) -> float | None:
        """Stored bytes per position."""
        return self.bytes / self.tokens if self.tokens else None


@dataclass(frozen=True)
class Facts:
    """One cache. bytes: of all its files; age: seconds since it was begun; fault: why it cannot
    be read, and whether repairing mends that."""

    url: str
    name: str
    identity: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0
    age: float | None = None
    kinds: tuple[Kind, ...] = ()
    fault: str = ""
    mendable: bool = False

    @property
    def method(self) -> str:
        """How the training records are kept, in few words."""
        values = self.identity
        if values.get("cache.method") == "sample":
            return f"sample {values.get('cache.draws')}"
        ragged = " ragged" if values.get("cache.keep") else ""
        return f"{values.get('cache.method', '?')} {values.get('cache.k', '')}".strip() + ragged


def facts_of(cache: Store, look_at: int) -> Facts:
    """Reads a cache's indexes, and the records of `look_at` sequences of each kind.

    Damage, and a format of another version, do not raise: they are the `fault`.
    """
    facts = outline_of(cache)
    if facts.fault:
        return facts
    try:
        return replace(facts, kinds=tuple(_kind(cache, k, look_at) for k in kinds_of(cache)))
    except CacheDamaged as error:
        return replace(facts, fault=f"{error.path} {error.why}", mendable=True)


def outline_of(cache: Store) -> Facts:
    """What the identity and the listing of a cache tell; no index is opened."""
    size = sum(sum(cache.sizes(folder).values()) for folder in ("", "codebooks", SHARDS))
    facts = Facts(cache.url, cache.name, bytes=size)
    try:
        identity = read_identity(cache)
    except CacheDamaged as error:
        return replace(facts, fault=f"{error.path} {error.why}", mendable=True)
    age = max(0.0, time.time() - cache.modified(IDENTITY))
    return replace(facts, identity=identity, age=age, fault=other_format(cache, identity))


def other_format(cache: Store, identity: dict[str, Any]) -> str:
    """Why a cache of this identity cannot be read by this version; "" if it can."""
    found = identity.get("format", VERSION)
    if found == VERSION:
        return ""
    return (
        f"is of format {found}, and this version reads {VERSION}; "
        f"remove it with: {command('rm', cache)}"
    )


def kinds_of(cache: Store) -> list[str]:
    """The kinds of records that a cache holds: train, its further draws, eval."""
    names = {kind_of(files.name) for files in list_shards(cache) if files.idx is not None}
    kinds = (name for name in names if name)
    return sorted(kinds, key=lambda name: (name == "eval", len(name), name))


def spread(keys: NDArray[np.uint8], count: int) -> list[bytes]:
    """At most `count` of the sorted keys [n, 16], evenly spaced; keys are hashes, so at random."""
    places = np.unique(np.linspace(0, len(keys) - 1, min(count, len(keys))).astype(np.int64))
    return [keys[place].tobytes() for place in places]


def _kind(cache: Store, kind: str, look_at: int) -> Kind:
    with CacheReader(cache, kind) as reader:
        shards = len(reader.shards())
        records = [reader.read(key) for key in spread(reader.keys, look_at)]
        sequences, size = len(reader), reader.bytes
    book = read_codebook(cache, kind)
    if not records or book is None:
        return Kind(kind, sequences, shards, size)
    lengths = [len(item.ids) for item in records]
    tokens = round(sequences * sum(lengths) / len(lengths))
    made = _masses(records, book.coding) if book.coding.temperatures else _uniques(records)
    same = len(set(lengths)) == 1
    return Kind(kind, sequences, shards, size, tokens, same, len(records), made)


def _masses(records: Sequence[Records], coding: Coding) -> Histogram:
    """How much probability the kept ids have, by the tail at temperature 1 where that is kept."""
    if 1.0 in coding.temperatures:
        column = coding.temperatures.index(1.0)
        parts = [-np.expm1(r.log_tails[:, column].astype(np.float64)) for r in records]
    else:
        parts = [np.exp(r.log_probs.astype(np.float64)).sum(axis=1) for r in records]
    return _histogram("retained mass", MASSES, np.concatenate(parts).clip(0.0, 1.0))


def _uniques(records: Sequence[Records]) -> Histogram:
    """How many different ids were drawn."""
    counts = np.concatenate([np.isfinite(r.log_probs).sum(axis=1) for r in records])
    return _histogram("unique ids", UNIQUES, counts.astype(np.float64))


def _histogram(what: str, edges: tuple[float, ...], values: NDArray[np.float64]) -> Histogram:
    bins = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges))
    last = int(np.flatnonzero(bins)[-1]) + 1 if what == "unique ids" else len(edges)
    shares = tuple((bins[:last] / len(values)).tolist())
    return Histogram(what, edges[:last], shares, float(values.mean()), len(values))


@dataclass(frozen=True)
class Coverage:
    """Sequences of one kind: wanted by the spec, and of these in the cache."""

    kind: str
    wanted: int
    present: int

    @property
    def missing(self) -> int:
        """Sequences that the next capture adds."""
        return self.wanted - self.present


def coverage_of(asked: Asked) -> list[Coverage] | None:
    """The coverage by kind; None while the corpus is not prepared. Raises CacheDamaged."""
    from trainer.corpus.corpus import is_complete, open_corpus
    from trainer.teacher.job import wanted

    if not is_complete(asked.corpus):
        return None
    keys: dict[str, list[bytes]] = {}
    for kind, part, numbers in wanted(asked.capture, open_corpus(asked.corpus)):
        keys.setdefault(kind, []).extend(part.keys[i].tobytes() for i in numbers)
    found = []
    for kind, of_kind in keys.items():
        asked_for = set(of_kind)
        with CacheReader(asked.cache, kind) as reader:
            absent = len(reader.missing(asked_for))
        found.append(Coverage(kind, len(asked_for), len(asked_for) - absent))
    return found


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
