"""Whether a cache's records are what its teacher says: the teacher again, over some sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from trainer.corpus.corpus import Corpus, Part, next_tokens
from trainer.logits.reader import CacheReader
from trainer.logits.records import Coding, train_kinds
from trainer.logits.store import command, read_codebook
from trainer.models.load import find_model
from trainer.teacher.job import Capture, batch_size, wanted
from trainer.teacher.sampling import BLOCK, draw, stream, uniforms
from trainer.verify.errors import (
    Faithfulness,
    Tally,
    drawn_errors,
    drawn_figures,
    kept_errors,
    kept_figures,
    scalar_errors,
)
from trainer.verify.rerun import Reruns, rerun

Chosen = list[tuple[Part, int]]


def faithfulness(
    job: Capture, corpus: Corpus, sequences: int, say: Callable[[str], None]
) -> list[Faithfulness]:
    """Compares at most `sequences` records of each kind with the teacher, run here and now.

    Kinds of which the cache has no sequence of this corpus are left out. Raises ValueError, one
    line, where the teacher cannot be run here, and CacheDamaged.
    """
    chosen = _choose(job, corpus, sequences)
    parts: dict[int, tuple[Part, set[int]]] = {}
    for pairs in chosen.values():
        for part, number in pairs:
            parts.setdefault(id(part), (part, set()))[1].add(number)
    if not parts:
        return []
    runs = rerun(
        find_model("teacher.model", job.teacher.model, job.teacher.revision),
        job.teacher.dtype,
        int(corpus.manifest["vocab_size"]),
        [(part, sorted(numbers)) for part, numbers in parts.values()],
        partial(batch_size, job),
        say,
    )
    return [_compare(job, kind, pairs, runs) for kind, pairs in chosen.items() if pairs]


def _choose(job: Capture, corpus: Corpus, count: int) -> dict[str, Chosen]:
    """By kind sequences of the corpus that the cache holds, evenly spaced in order of their keys
    (which are hashes); the same ones for all sets of draws, as far as they are there."""
    chosen: dict[str, Chosen] = {}
    for kind, keyed in _keyed(job, corpus).items():
        with CacheReader(job.cache, kind) as reader:
            absent = set(reader.missing(keyed))
        present = sorted(key for key in keyed if key not in absent)
        places = np.unique(np.linspace(0, len(present) - 1, min(count, len(present))).astype(int))
        chosen[kind] = [keyed[present[place]] for place in places]
    return chosen


def _keyed(job: Capture, corpus: Corpus) -> dict[str, dict[bytes, tuple[Part, int]]]:
    keyed: dict[str, dict[bytes, tuple[Part, int]]] = {}
    for kind, part, numbers in wanted(job, corpus):
        of_kind = keyed.setdefault(kind, {})
        of_kind.update({part.keys[i].tobytes(): (part, i) for i in numbers})
    return keyed


def _compare(job: Capture, kind: str, chosen: Chosen, runs: Reruns) -> Faithfulness:
    book = read_codebook(job.cache, kind)
    assert book is not None  # there are records
    coding, tally = book.coding, Tally()
    with CacheReader(job.cache, kind) as reader:
        for part, number in chosen:
            _compare_one(job, kind, coding, tally, reader, part, number, runs)
    figures = drawn_figures(tally) if coding.method == "sample" else kept_figures(tally, coding)
    return Faithfulness(kind, len(chosen), tally.positions, figures)


def _compare_one(
    job: Capture,
    kind: str,
    coding: Coding,
    tally: Tally,
    reader: CacheReader,
    part: Part,
    number: int,
    runs: Reruns,
) -> None:
    batch = part.batch([number])
    key = batch.keys[0].tobytes()
    record = reader.read(key)
    captured = np.ones(batch.input_ids.shape[1], bool)
    if job.cache_spec.positions == "loss":
        captured = batch.loss_mask[0] != 0
    if len(record.ids) != captured.sum():
        raise ValueError(
            f"{job.cache.url}: the record of sequence {key.hex()} has {len(record.ids)} positions, "
            f"and the sequence {captured.sum()}; remove the cache with: {command('rm', job.cache)}"
        )
    labels = torch.from_numpy(next_tokens(batch.input_ids)[0])
    others = {"batch": runs.reshaped, "dtype": runs.float32}
    others_logits = {name: run.logits(key) for name, run in others.items() if run is not None}
    done = 0
    for start, logits in runs.captured.logits(key):
        inside = torch.from_numpy(np.flatnonzero(captured[start : start + len(logits)]))
        # Compared on the CPU: float64 is slow or missing on some devices.
        noisy = {name: next(more)[1].cpu()[inside] for name, more in others_logits.items()}
        logits = logits.cpu()[inside]
        rows = slice(done, done + len(inside))
        done = rows.stop
        if not len(inside):
            continue
        positions = start + inside
        ids = torch.from_numpy(record.ids[rows])
        log_q = torch.from_numpy(record.log_probs[rows])
        if coding.method == "sample":
            redraw = partial(_redraw, job, kind, key, positions, coding.k)
            tally.add(**drawn_errors(ids, log_q, coding.k, logits, noisy, redraw))
            continue
        log_p = torch.log_softmax(logits.double(), dim=1)
        noisy = {name: torch.log_softmax(more.double(), dim=1) for name, more in noisy.items()}
        tails = torch.from_numpy(record.log_tails[rows])
        values = kept_errors(ids, log_q, tails, coding.temperatures, log_p, noisy)
        if coding.method == "exact":
            assert record.entropy is not None and record.true_log_prob is not None
            entropy, true = (
                torch.from_numpy(v[rows]) for v in (record.entropy, record.true_log_prob)
            )
            values |= scalar_errors(entropy, true, labels[positions], log_p, noisy)
        tally.add(**values)


def _redraw(
    job: Capture, kind: str, key: bytes, positions: Tensor, draws: int, logits: Tensor
) -> Tensor:
    """The draws that a capture makes of logits [positions, vocab]: int64 [positions, draws]."""
    number = train_kinds(job.cache_spec).index(kind)
    words = torch.tensor([stream(job.cache_spec.seed, key, number)]).expand(len(logits), 4)
    room = -logits.shape[1] % BLOCK
    padded = torch.nn.functional.pad(logits, (0, room), value=-torch.inf)
    probabilities = torch.softmax(padded, dim=1)
    return draw(probabilities, uniforms(words, positions, draws)).long()
