"""Whether a logit cache's records are faithful to their teacher, and how that is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group

from cluster.storage import Store
from jobs.caches import show
from jobs.caches.facts import other_format
from jobs.caches.find import Asked
from jobs.errors import SpecErrors
from jobs.report.figures import NOTHING
from trainer.logits.store import SHARDS, CacheDamaged, command, read_identity
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
    return f"{show.size(sum(sizes.values()))} in {len(sizes):,} files"


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
