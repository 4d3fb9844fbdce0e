"""How much of what a spec's runs will read is in the logit cache."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.caches.find import Asked
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
