"""How many tokens a corpus has: as it was prepared before, or guessed from its bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.storage import open_store
from jobs.spec import JobSpec
from trainer.corpus import files
from trainer.corpus.corpus import existing_identity, has_all, settings
from trainer.spec.sections import DataSpec, SourceSpec
from trainer.stage_inputs import CORPORA, learnt_data, train_sequences

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


def corpus_tokens(spec: JobSpec, vocab: int) -> Corpus:
    """The corpus of a spec. Raises ValueError, one line, for local files that are not there."""
    assert spec.data is not None
    data = learnt_data(spec)
    length = data.sequence_length
    held_out = (data.select_sequences + data.report_sequences) * length
    if data.corpus is not None:
        return Corpus(_given(spec, data) * length, held_out, PREPARED)
    sizes = [_bytes(f"data.train.{index}", source) for index, source in enumerate(data.train)]
    found = _prepared(spec, data)
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


def _given(spec: JobSpec, data: DataSpec) -> int:
    """Sequences of train in the corpus that `data.corpus` names. Raises ValueError, one line, for
    one that is not there or does not fit."""
    from trainer.corpus.corpus import MANIFEST

    store = open_store(spec.storage).sub(CORPORA, str(data.corpus))
    existing_identity(data, store, _tokenizer(spec), train_sequences(spec))
    return int(store.read_json(MANIFEST)["parts"]["train"]["sequences"])


def _prepared(spec: JobSpec, data: DataSpec) -> int | None:
    """Sequences of train in a corpus on local storage that is of the same sources and lengths."""
    if "://" in spec.storage:
        return None
    store = open_store(spec.storage).sub(CORPORA)
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
