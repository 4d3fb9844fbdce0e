"""Bytes on storage (corpus, logit cache, student, checkpoints, cells), and tokens of a corpus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.storage import Store, open_store
from jobs.forecast.stage_memory import Models, cell_bytes, swept
from jobs.forecast.training_memory import itemsize_of, trained_parameters
from jobs.spec.job import JobSpec
from quant.grid import allocated_keys, grid
from trainer.corpus import files
from trainer.corpus.identity import has_all, settings
from trainer.logits.records import EVAL_IDS
from trainer.spec.sections import CacheSpec, DataSpec, SourceSpec
from trainer.stage_inputs import CORPORA, learnt_data, train_sequences

# What the codec takes (docs/cache.md has the measurements): a record's head and its entry in an
# index, per sequence; bits of an id's place among all, as a share of log2 C(vocabulary, ids), with
# ids numbered as they are or by frequency; bits of a value; bits of the tail and the count of ids.
SEQUENCE_BYTES = 8 + 28
PLACE = {"none": 1.0, "frequency": 0.667}
DRAWN_PLACE = {"none": 1.0, "frequency": 0.74}  # which draws are frequent ones as it is
VALUE_BITS, DRAWN_BITS = 3.6, 1.93
FINER = 0.17  # at more than 50 ids the values of the last ones are small, and cheap
EVAL_BITS, EVAL_BYTES = 16.75, 12
TAIL_BITS, TEMPERATURE_BITS = 6.0, 16.0
CORPUS_BYTES = 6.1  # per token: ids, positions and the loss mask in Arrow


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of records: per token of train (one set of draws) and of the held-out parts; ids per
    token of train."""

    train: float
    held_out: float
    ids: float


def cache_bytes(cache: CacheSpec, vocab: int, length: int) -> CacheBytes:
    """Bytes per token of a cache's records, their share of index and head included.

    Draws hit as many different ids as in text of mean entropy 2.4 nats (`typical`); a teacher that
    is less certain has more of them, the demo's twice as many.
    """
    overhead = SEQUENCE_BYTES / length
    if cache.method == "sample":
        ids = min(float(vocab), typical(vocab).distinct(cache.draws))
        bits = ids * (DRAWN_PLACE[cache.remap] * place_bits(vocab, ids) + DRAWN_BITS) + TAIL_BITS
    else:
        k = min(cache.k, vocab)
        step = 0.0155 * (50 / k) ** 0.36 if cache.step == "auto" else cache.step
        ids = float(k)
        value = VALUE_BITS * (50 / max(50, k)) ** FINER
        if cache.keep:
            ids = typical(vocab).above((cache.keep * step) ** 2, k)
        bits = ids * (PLACE[cache.remap] * place_bits(vocab, ids) + value)
        bits += TAIL_BITS * (2 if cache.keep else 1)
        bits += TEMPERATURE_BITS * sum(temperature != 1 for temperature in cache.temperatures)
    kept = min(EVAL_IDS, vocab)
    held_out = kept * (PLACE[cache.remap] * place_bits(vocab, kept) + EVAL_BITS) / 8 + EVAL_BYTES
    return CacheBytes(bits / 8 + overhead, held_out + overhead, ids)


def place_bits(vocab: int, ids: float) -> float:
    """Bits per id of a set of ids out of `vocab`: log2 C(vocab, ids) / ids."""
    if ids >= vocab:
        return 0.0
    chosen = math.lgamma(vocab + 1) - math.lgamma(ids + 1) - math.lgamma(vocab - ids + 1)
    return chosen / math.log(2) / ids


class Typical:
    """Next-token distributions as large models have them on text, in mean over positions.

    With u, u' uniform on [0, 1] the probability of rank r is as (r + exp(4 u' - 3))^-(1.15 +
    2.6 u^1.3): the curve of `tests/bench/synthetic.py`, of mean entropy 2.4 nats.
    """

    def __init__(self, vocab: int, grid: int = 12) -> None:
        import numpy as np

        u = (np.arange(grid) + 0.5) / grid
        power = (1.15 + 2.6 * u**1.3)[:, None, None]
        offset = np.exp(4 * u - 3)[None, :, None]
        # Ranks one by one at first, then in blocks that stand for many.
        edges = np.unique(np.geomspace(1, vocab + 1, 600).astype(np.int64))
        ranks, self._count = (edges[:-1] + edges[1:] - 1) / 2, np.diff(edges)
        mass = (ranks + offset) ** -power
        self._p = mass / (mass * self._count).sum(axis=-1, keepdims=True)
        self._first = edges[:-1]

    def distinct(self, draws: int) -> float:
        """Different ids in so many draws with replacement."""
        return float(((1 - (1 - self._p) ** draws) * self._count).sum(axis=-1).mean())

    def above(self, least: float, k: int) -> float:
        """Of the k most likely ids those with a probability of at least `least`."""
        kept = (self._p >= least) & (self._first <= k)
        return max(1.0, float((kept * self._count).sum(axis=-1).clip(max=k).mean()))


@lru_cache(maxsize=2)
def typical(vocab: int) -> Typical:
    """The typical distributions over so many ids."""
    return Typical(vocab)


def storage(
    models: Models, spec: JobSpec, tokens: dict[str, int], redraws: int, captured: bool
) -> dict[str, Any]:
    """Bytes on storage by what they are of. tokens: of the corpus's train part, of those that are
    captured of it, and held out. captured: whether train has records."""
    assert spec.data is not None
    found: dict[str, Any] = {
        "corpus": round(CORPUS_BYTES * (tokens["corpus"] + tokens["held_out"]))
    }
    if models.teacher is not None:
        rate = cache_bytes(spec.cache, models.teacher.vocab, spec.data.sequence_length)
        train = rate.train * tokens["captured"] * redraws if captured else 0.0
        held_out = rate.held_out * tokens["held_out"]
        found["cache"] = {
            "bytes": round(train + held_out),
            "train_bytes": round(train),
            "held_out_bytes": round(held_out),
            "train_bytes_per_token": round(rate.train, 2),
            "held_out_bytes_per_token": round(rate.held_out, 2),
            "ids_per_token": round(rate.ids, 1),
            "sets": redraws if captured else 0,
        }
    if spec.distill is not None:
        itemsize = itemsize_of(spec.distill.dtype)
        student = itemsize * models.student.parameters
        found["student"] = student
        found["checkpoint"] = checkpoint_bytes(models, spec)
        # One more is there while the oldest is not deleted yet; the best weights lie beside them.
        found["checkpoints"] = (spec.distill.keep_checkpoints + 1) * found["checkpoint"] + student
        found["control"] = student if spec.distill.control else 0
    if spec.sweep is not None:
        shapes = swept(models, spec)
        kept = spec.sweep.keep_models != "none"
        sizes = [cell_bytes(shapes[cell.model], cell.spec) for cell in grid(spec.sweep)]
        sizes += [round(mb * 1e6) for mb in allocated_keys(spec.sweep).values()]
        found["cells"] = sum(sizes) if kept else 0
    flat = [value["bytes"] if isinstance(value, dict) else value for value in found.values()]
    found["total"] = sum(flat) - found.get("checkpoint", 0)
    return found


def checkpoint_bytes(models: Models, spec: JobSpec) -> int:
    """Bytes of one checkpoint of all ranks: weights that learn, their masters and moments."""
    assert spec.distill is not None
    trained = trained_parameters(models.student, spec)
    return (itemsize_of(spec.distill.dtype) + 12) * trained


# UTF-8 bytes of the prose that ships with CPython 3.11; later versions have a little more.
BUILTIN_BYTES = 1_920_000
# Text in a parquet file is compressed to about 40 %.
UNPACKED = {".parquet": 2.5}
# Bytes of English text per token of a BPE: 3.1 at 2,048 entries, 4.4 at 128,256 (Llama 3).
BYTES_AT_ONE, BYTES_PER_DOUBLING = 0.77, 0.215
PREPARED = "prepared before"


@dataclass(frozen=True)
class Corpus:
    """Tokens of train and of the held-out parts; train: None where nobody knows. told: how it is
    known."""

    train: int | None
    held_out: int
    told: str


def corpus_tokens(spec: JobSpec, vocab: int, storage: Store | None = None) -> Corpus:
    """The corpus of a spec. Raises ValueError, one line, for local files that are not there."""
    assert spec.data is not None
    data = learnt_data(spec)
    length = data.sequence_length
    held_out = (data.select_sequences + data.report_sequences) * length
    if data.corpus is not None:
        return Corpus(_existing_sequences(spec, data) * length, held_out, PREPARED)
    sizes = [_bytes(f"data.train.{index}", source) for index, source in enumerate(data.train)]
    found = _prepared(spec, data, storage)
    if found is not None:
        return Corpus(found * length, held_out, PREPARED)
    if spec.responses is not None and spec.distill is not None:
        return Corpus(None, held_out, "answers are not counted before they are made")
    if any(size is None for size in sizes):
        return Corpus(None, held_out, "a hub data set is not counted; taken to be large enough")
    total = sum(size for size in sizes if size is not None)
    tokens = int(total / bytes_per_token(vocab)) - held_out
    return Corpus(max(length, tokens // length * length), held_out, "guessed from its bytes")


def bytes_per_token(vocab: int) -> float:
    """UTF-8 bytes of English text per token of a tokenizer with so many entries, about."""
    return BYTES_AT_ONE + BYTES_PER_DOUBLING * math.log2(vocab)


def _bytes(key: str, source: SourceSpec) -> float | None:
    """UTF-8 bytes of a source's text; None where only the hub knows."""
    if source.source.startswith("builtin:"):
        return float(BUILTIN_BYTES)
    if not files.is_local(source.source):
        return None
    found = [Path(path) for path in files.find(key, source.source)]
    return sum(path.stat().st_size * UNPACKED.get(path.suffix.lower(), 1.0) for path in found)


def _existing_sequences(spec: JobSpec, data: DataSpec) -> int:
    """Sequences of train in the corpus that `data.corpus` names. Raises ValueError, one line, for
    one that is not there or does not fit."""
    from trainer.corpus.corpus import MANIFEST, existing_identity

    store = open_store(spec.storage).sub(CORPORA, str(data.corpus))
    existing_identity(data, store, _tokenizer(spec), train_sequences(spec))
    return int(store.read_json(MANIFEST)["parts"]["train"]["sequences"])


def _prepared(spec: JobSpec, data: DataSpec, storage: Store | None) -> int | None:
    """Sequences of train in a corpus on local storage that is of the same sources and lengths."""
    if "://" in spec.storage:
        return None
    store = (storage or open_store(spec.storage)).sub(CORPORA)
    tokenizer = {f"tokenizer.{key}": value for key, value in _tokenizer(spec).items()}
    for name in store.list():
        if not store.exists(f"{name}/manifest.json"):
            continue
        manifest = store.read_json(f"{name}/manifest.json")
        identity = manifest.get("identity", {})
        wanted = {**_identity(data), **tokenizer}
        if all(identity.get(key) == value for key, value in wanted.items()):
            sequences = int(manifest["parts"]["train"]["sequences"])
            if has_all(manifest) or sequences >= (train_sequences(spec) or 0):
                return sequences
    return None


def _identity(data: DataSpec) -> dict[str, Any]:
    """What of a corpus's identity is known without reading its sources."""
    found: dict[str, Any] = {f"data.{key}": value for key, value in settings(data).items()}
    for index, source in enumerate(data.train):
        found[f"data.train.{index}.format"] = source.format
        if source.source.startswith("builtin:") or not files.is_local(source.source):
            found[f"data.train.{index}.source"] = source.source
    return found


def _tokenizer(spec: JobSpec) -> Mapping[str, Any]:
    """The tokenizer's part of the identity, as far as its folder is here."""
    from trainer.models.load import tokenizer_identity

    if spec.tokenizer is not None:
        return {"train": spec.tokenizer.train}
    model = spec.teacher.model if spec.teacher is not None else spec.student.model
    folder = Path(str(model)).expanduser()
    if not folder.is_dir():
        return {}
    return tokenizer_identity(folder)
