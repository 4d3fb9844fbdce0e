"""Verifies logit caches, repairs them and removes them, and says first what would be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group

from cluster.storage import Store, open_store
from cluster.storage.keys import fingerprint
from cluster.storage.store import format_bytes
from jobs.caches import show
from jobs.caches.describe import other_format
from jobs.caches.find import Asked
from jobs.errors import SpecErrors
from jobs.report.formats import NOTHING
from trainer.logits.index import KEY_BYTES, Index, kind_of
from trainer.logits.repair import Damage
from trainer.logits.store import (
    IDENTITY,
    SHARDS,
    CacheDamaged,
    Files,
    cache_fingerprint,
    command,
    list_shards,
    open_cache,
    read_identity,
    read_own_index,
)
from trainer.verify.errors import Faithfulness

LABELS = {
    "record": "record error (nats)",
    "tail": "record error of the tail (nats)",
    "missed": "loss by ids not the most likely (nats)",
    "truncation": "truncation error (nats)",
    "entropy": "error of the entropy (nats)",
    "true": "error of the true token's log p (nats)",
    "moved": "draws that differ when redrawn (share)",
    "z": "bias of the draws (standard errors)",
    "draws": "draws missing per position",
    "unique": "unique ids per position",
}


def faithfulness_of(
    asked: Asked, sequences: int, say: Callable[[str], None], run: str
) -> list[Faithfulness]:
    """The teacher's records of a spec's corpus against the teacher itself, kind by kind.

    run: the command that fills the cache of the spec. Raises SpecErrors where there is nothing to
    compare, ValueError as `faithfulness` does.
    """
    from transformers.utils import logging

    from trainer.corpus.corpus import is_complete, open_corpus
    from trainer.verify.faithfulness import faithfulness

    logging.disable_progress_bar()
    if not is_complete(asked.corpus):
        raise SpecErrors([f"{asked.corpus.url}: no such corpus; prepare it with: {run}"])
    kinds = faithfulness(asked.capture, open_corpus(asked.corpus), sequences, say)
    if not kinds:
        raise SpecErrors(
            [f"{asked.cache.url}: no sequence of this spec's corpus is in it; add them with: {run}"]
        )
    return kinds


def readable(cache: Store) -> None:
    """Raises SpecErrors for a cache of a format that this version does not read."""
    try:
        other = other_format(cache, read_identity(cache))
    except CacheDamaged:  # found, and told, with all other damage
        return
    if other:
        raise SpecErrors([f"{cache.url}: {other}"])


def size_of(cache: Store) -> str:
    """How much there is to read."""
    sizes = cache.sizes(SHARDS)
    return f"{format_bytes(sum(sizes.values()))} in {len(sizes):,} files"


def table(kind: Faithfulness) -> Group:
    """The figures of one kind, each beside the teacher's own noise."""
    made = show.table("", ">Mean", ">Other batch", ">float32", ">Limit", "")
    for name, figure in kind.figures.items():
        numbers = (figure.value, figure.batch_noise, figure.dtype_noise, figure.limit)
        verdict = "" if figure.limit is None else ("ok" if figure.holds else "UNFAITHFUL")
        made.add_row(LABELS[name], *(_number(number) for number in numbers), verdict)
    title = f"{kind.kind}: {kind.sequences:,} sequences, {kind.positions:,} positions"
    return Group(title, made)


def as_json(kind: Faithfulness) -> dict[str, Any]:
    """The figures of one kind for programs."""
    return {**asdict(kind), "ok": kind.holds}


def faults(cache: Store, kinds: Sequence[Faithfulness], run: str) -> list[str]:
    """One line for each kind that is unfaithful: what is over its limit, and what mends it."""
    lines = []
    for kind in kinds:
        over = [
            f"{LABELS[name]} {_number(figure.value)} is over {_number(figure.limit)}"
            for name, figure in kind.figures.items()
            if not figure.holds
        ]
        if over:
            lines.append(
                f"{cache.url}: unfaithful records of {kind.kind}: {'; '.join(over)}; start anew "
                f"with: {command('rm', cache)} && {run}"
            )
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.3g}" if not abs(value) < 1e-15 else "0"  # a sum's rounding; NaN is shown


THREADS = 8


@dataclass(frozen=True)
class Loss:
    """What mending takes from one kind of records.

    sequences: those that no other shard holds, which the next capture makes again if they are
    still wanted; unknown: as many more at most, of shards whose index cannot be read.
    """

    kind: str
    sequences: int
    unknown: int


def losses(cache: Store, found: Sequence[Damage]) -> list[Loss]:
    """What is lost by mending these damages, by kind."""
    shards = {d.path.rpartition("/")[2][:-4]: d for d in found if d.sequences}
    kinds = sorted({kind for name in shards if (kind := kind_of(name))})
    listed = list_shards(cache)
    where = cache_fingerprint(cache) if kinds else ""
    result = []
    for kind in kinds:
        lost: list[NDArray] = []
        held: list[NDArray] = []
        unknown = 0
        of_kind = [f for f in listed if kind_of(f.name) == kind and f.idx is not None]
        with ThreadPoolExecutor(THREADS) as pool:
            indexes = list(pool.map(lambda files: _index(cache, files), of_kind))
        for files, index in zip(of_kind, indexes, strict=True):
            if index is None:
                unknown += shards[files.name].sequences if files.name in shards else 0
            elif index.cache == where:  # another cache's were never readable here
                (lost if files.name in shards else held).append(_keys(index))
        gone = np.setdiff1d(_all(lost), _all(held))
        result.append(Loss(kind, len(gone), unknown))
    return result


def consequences(found: Sequence[Loss]) -> list[str]:
    """What mending costs, in words."""
    if not found:
        return ["no records are lost by mending this"]
    lines = []
    for loss in found:
        count = f"{loss.sequences:,}"
        if loss.unknown:
            count = f"{loss.sequences:,} to {loss.sequences + loss.unknown:,}"
        lines.append(
            f"the next run captures {count} sequences of {loss.kind} again, if it wants them"
        )
    return lines


def restore_identity(cache: Store, identities: Iterable[dict[str, Any]]) -> bool:
    """Writes a cache's identity again if one of these is it; whether it is there afterwards."""
    folder = open_store(cache.url.rpartition("/")[0])
    for identity in identities:
        if fingerprint(identity) == cache.name and not cache.exists(IDENTITY):
            open_cache(folder, identity)
    return cache.exists(IDENTITY)


def remove(cache: Store) -> None:
    """Deletes a cache: indexes first, so that what a kill leaves of it is no damage."""
    indexes = [f"{SHARDS}/{name}" for name in cache.list(SHARDS) if name.endswith(".idx")]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda path: _delete(cache, path), indexes))
    with suppress(FileNotFoundError):
        cache.delete("", recursive=True)


def _delete(cache: Store, path: str) -> None:
    with suppress(FileNotFoundError):
        cache.delete(path)


def _index(cache: Store, files: Files) -> Index | None:
    """A shard's index, None if it cannot be read."""
    with suppress(CacheDamaged):
        return read_own_index(cache, files)
    return None


def _keys(index: Index) -> NDArray:
    return np.ascontiguousarray(index.keys).reshape(-1).view(f"S{KEY_BYTES}")


def _all(keys: Sequence[NDArray]) -> NDArray:
    return np.concatenate(keys) if keys else np.zeros(0, f"S{KEY_BYTES}")
