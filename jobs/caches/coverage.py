"""How much of what a spec's runs will read is in the logit cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.caches.find import Asked
from trainer.job import make_capture
from trainer.logits.reader import CacheReader


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


def capture_of(asked: Asked) -> Any:
    """The capture (`trainer.teacher.Capture`) that fills the cache of a spec."""
    assert asked.spec is not None
    settings = asked.spec.resources.capture
    return make_capture(
        asked.spec,
        asked.corpus,
        asked.cache,
        batch_tokens=settings.batch_tokens,
        shard_seconds=settings.shard_seconds,
    )


def coverage_of(asked: Asked) -> list[Coverage] | None:
    """The coverage by kind; None while the corpus is not prepared. Raises CacheDamaged."""
    from trainer.corpus.corpus import is_complete, open_corpus
    from trainer.teacher import wanted

    if not is_complete(asked.corpus):
        return None
    keys: dict[str, list[bytes]] = {}
    for kind, part, numbers in wanted(capture_of(asked), open_corpus(asked.corpus)):
        keys.setdefault(kind, []).extend(part.keys[i].tobytes() for i in numbers)
    found = []
    for kind, of_kind in keys.items():
        asked_for = set(of_kind)
        with CacheReader(asked.cache, kind) as reader:
            absent = len(reader.missing(asked_for))
        found.append(Coverage(kind, len(asked_for), len(asked_for) - absent))
    return found
