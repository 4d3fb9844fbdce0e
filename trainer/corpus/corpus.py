"""Reading a corpus: sequences of fixed length in three parts, memory-mapped.

corpus = open_corpus(open_store("./runs/_corpora/<fingerprint>"))
part = corpus.part("train")
batch = part.batch(np.array([3, 1, 4]))
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.storage import Store
from cluster.storage.keys import fingerprint
from trainer.corpus.arrow import Table, read_table
from trainer.corpus.identity import FORMAT, has_all, settings
from trainer.corpus.packing import position_ids
from trainer.spec.sections import DataSpec

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
PARTS = ("train", "select", "report")


@dataclass(frozen=True)
class Batch:
    """Sequences for a model.

    input_ids: int64 [b, L]. position_ids: int64 [b, L], from 0 in every document (with packing:
    concat, in every sequence). loss_mask: float32 [b, L], 1 where the prediction of the next token
    counts. keys: uint8 [b, 16].
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    keys: NDArray[np.uint8]


class Part:
    """The sequences of one part, numbered from 0; files are mapped when first read."""

    def __init__(self, store: Store, entry: dict[str, Any], length: int) -> None:
        self._store, self._length = store, length
        self._names = [file["name"] for file in entry["files"]]
        counts = [file["sequences"] for file in entry["files"]]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._tables: dict[int, Table] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    @cached_property
    def keys(self) -> NDArray[np.uint8]:
        """Sequence keys: uint8 [n, 16]."""
        return np.concatenate([np.zeros((0, 16), np.uint8), *(t.keys for t in self._all())])

    @cached_property
    def sources(self) -> NDArray[np.int16]:
        """Index in `data.train` of the source of each sequence's first token: int16 [n]."""
        return np.concatenate([np.zeros(0, np.int16), *(t.sources for t in self._all())])

    @cached_property
    def loss_tokens(self) -> NDArray[np.int64]:
        """Positions that count in each sequence: int64 [n]."""
        counts = [t.loss_tokens.astype(np.int64) for t in self._all()]
        return np.concatenate([np.zeros(0, np.int64), *counts])

    def batch(self, indices: ArrayLike) -> Batch:
        """The sequences `indices` ([b], any order, repeats allowed).

        Raises:
            IndexError: a number is not in [0, len).
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"sequence numbers must be in [0, {len(self)}), got {wanted}")
        shape = (len(wanted), self._length)
        ids, starts = np.empty(shape, np.int64), np.empty(shape, np.uint8)
        mask, keys = np.empty(shape, np.float32), np.empty((len(wanted), 16), np.uint8)
        files = np.searchsorted(self._first, wanted, side="right") - 1
        for file in np.unique(files):
            places = np.flatnonzero(files == file)
            rows, table = wanted[places] - self._first[file], self._table(int(file))
            ids[places], starts[places] = table.input_ids[rows], table.document_start[rows]
            mask[places], keys[places] = table.loss_mask[rows], table.keys[rows]
        return Batch(ids, position_ids(starts), mask, keys)

    def mixed(self, indices: ArrayLike) -> NDArray[np.bool_]:
        """Which of the sequences `indices` ([b]) hold parts of several documents: [b]."""
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        result = np.empty(len(wanted), bool)
        files = np.searchsorted(self._first, wanted, side="right") - 1
        for file in np.unique(files):
            places = np.flatnonzero(files == file)
            starts = self._table(int(file)).document_start
            for some in np.array_split(places, -(-len(places) // 4096)):
                result[some] = starts[wanted[some] - self._first[file], 1:].any(axis=1)
        return result

    def _table(self, file: int) -> Table:
        if file not in self._tables:
            self._tables[file] = read_table(self._store.fetch(self._names[file]))
        return self._tables[file]

    def _all(self) -> list[Table]:
        return [self._table(file) for file in range(len(self._names))]


class Corpus:
    """A finished corpus; `manifest` is its manifest.json."""

    def __init__(self, store: Store, manifest: dict[str, Any]) -> None:
        self._store = store
        self.manifest = manifest
        self._parts: dict[str, Part] = {}

    def tokenizer_folder(self) -> Path:
        """A local folder that AutoTokenizer loads."""
        return self._store.fetch_folder(TOKENIZER)

    def part(self, name: str) -> Part:
        """The part `train`, `select` or `report`."""
        if name not in PARTS:
            raise ValueError(f"no part {name!r} in a corpus; may be {', '.join(PARTS)}")
        if name not in self._parts:
            entry = self.manifest["parts"][name]
            self._parts[name] = Part(self._store, entry, self.manifest["sequence_length"])
        return self._parts[name]

    def verify(self) -> list[str]:
        """Names of the files whose bytes are not those that were written; reads all of them."""
        files = [file for part in PARTS for file in self.manifest["parts"][part]["files"]]
        return [file["name"] for file in files if not self._intact(file)]

    def _intact(self, file: dict[str, Any]) -> bool:
        if not self._store.exists(file["name"]):
            return False
        data = self._store.read_bytes(file["name"])
        return hashlib.blake2b(data, digest_size=16).hexdigest() == file["blake2b"]


def is_complete(store: Store) -> bool:
    """Whether the corpus is finished: the manifest is written last."""
    return store.exists(MANIFEST)


def open_corpus(store: Store) -> Corpus:
    """Open a finished corpus.

    Raises:
        ValueError: it is not finished, or of another format.
    """
    if not is_complete(store):
        raise ValueError(f"no finished corpus at {store.url}; run the prepare stage")
    manifest = store.read_json(MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"the corpus at {store.url} has format {manifest.get('format')}, this version reads "
            f"{FORMAT}; delete it and run the prepare stage again"
        )
    return Corpus(store, manifest)


def next_tokens(input_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels [batch, seq]: the token after each position (0 after the last, which never counts)."""
    labels = np.zeros_like(input_ids)
    labels[:, :-1] = input_ids[:, 1:]
    return labels


def existing_identity(
    data: DataSpec,
    corpus: Store,
    tokenizer: Mapping[str, Any],
    train_sequences: int | None = None,
) -> dict[str, Any]:
    """The identity of the finished corpus `corpus`, named by `data.corpus`.

    tokenizer: the identity of the spec's, flat. train_sequences: as many of train as are read.
    Raises ValueError, one line, if the corpus is not there, has fewer sequences although there are
    more, or was made with other settings, another tokenizer or another number of sources.
    """
    try:
        manifest = open_corpus(corpus).manifest
        found: dict[str, Any] = manifest["identity"]
    except ValueError as error:
        raise ValueError(f"data.corpus: {error}") from None
    if fingerprint(found) != data.corpus:
        raise ValueError(
            f"data.corpus: what is at {corpus.url} is another corpus than its name says"
        )
    wanted = {
        **{f"data.{key}": value for key, value in settings(data).items()},
        **{f"tokenizer.{key}": value for key, value in tokenizer.items()},
    }
    for key, value in wanted.items():
        if key in found and found[key] != value:
            raise ValueError(
                f"{key}: got {value}, but the corpus {data.corpus} (data.corpus) was made with "
                f"{found[key]}; set it so, or remove data.corpus"
            )
    there = manifest["parts"]["train"]["sequences"]
    if there < (train_sequences or 0) and not has_all(manifest):
        raise ValueError(
            f"data.corpus: {data.corpus} has {there:,} sequences of train and not all of its "
            f"sources, but {train_sequences:,} are read; lower data.max_tokens or distill.steps, "
            "or remove data.corpus"
        )
    sources = {key.split(".")[2] for key in found if key.startswith("data.train.")}
    if len(sources) != len(data.train):
        raise ValueError(
            f"data.train: has {len(data.train)} sources, but the corpus {data.corpus} "
            f"(data.corpus) was made of {len(sources)}; give those, or remove data.corpus"
        )
    return found
