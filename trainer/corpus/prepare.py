"""Making a corpus: shards are mapped over tasks, the rest is arithmetic on their results.

In one process:

    tokenizer = load_tokenizer("Qwen/Qwen3-0.6B")          # or TokenizerSpec(train=2048)
    identity = corpus_identity(data, tokenizer)
    store = open_store("./runs").sub("_corpora", fingerprint(identity))    # trainer.identity
    manifest = prepare(data, tokenizer, store, identity=identity)

On a cluster, `each` maps the same functions over tasks; they are top-level and their arguments
pickle, and results must come back in the order of the calls:

    def each(function, calls):                              # with ray, on the jobs floor
        remote = ray.remote(function)
        return ray.get([remote.remote(*call) for call in calls])

    prepare(data, tokenizer, store, each, identity=identity)

The result is a function of data, tokenizer and the number of train sequences that is asked for
alone: of no number, order or place of tasks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cluster.storage import Store
from trainer.corpus import arrow
from trainer.corpus import packing as pack
from trainer.corpus import tokenizer as tokenizers_
from trainer.corpus.chat_template import chat_faults
from trainer.corpus.corpus import MANIFEST, PARTS, TOKENIZER
from trainer.corpus.identity import FORMAT, SEED, TRAIN_SEQUENCES
from trainer.corpus.size import too_small
from trainer.corpus.sources import Document, Shard, resolve_all
from trainer.corpus.splits import Documents, merge, read_in_order, read_rows, scan
from trainer.spec.sections import DataSpec, TokenizerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Each = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]

BYTES_PER_TOKEN = 5.0  # first guess of how much text the held-out parts need; exact counts follow
SPARE = 1.05  # of the text that is estimated to suffice for train
NEARLY_ALL = 0.8  # where train needs more than this of the text, it gets all
TOKENIZER_BYTES = 128 << 20  # a tokenizer is trained on at most so much text


def serial(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The plain way to map: one call after the other."""
    return [function(*call) for call in calls]


def prepare(
    data: DataSpec,
    tokenizer: Any,  # noqa: ANN401
    store: Store,
    each: Each = serial,
    *,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """Make the corpus in `store` and return its manifest, which is written last.

    `tokenizer`: one that is loaded, or a TokenizerSpec to train one on documents of train.
    `identity`: of `corpus_identity`. Of train no more is tokenized than it asks for, about: the
    documents that follow those of report in the order of their hashes, so that a corpus that asks
    for more begins with the same sequences. Where all documents are needed they stay as the
    sources have them.

    Raises:
        ValueError: a source is wrong, or the corpus is too small for its parts.
    """
    shards = resolve_all(data)
    for fault in chat_faults(data, tokenizer):
        raise ValueError(fault)
    limits = (data.min_chars, data.max_chars)
    documents = merge(each(scan, [(shard, *limits) for shard in shards]), SEED)
    if len(documents) == 0:
        raise too_small(data, "no document is left of them")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / TOKENIZER
        held_out = _HeldOut(data, shards, documents, each)
        if isinstance(tokenizer, TokenizerSpec):
            tokenizer, found = held_out.with_trained(tokenizer.train, folder)
        else:
            tokenizer.save_pretrained(folder)
            found = held_out.select_and_report(tokenizer)
        store.upload_folder(folder, TOKENIZER)

    files: dict[str, list[arrow.FileInfo]] = {}
    train = _Train(data, shards, documents, store, each, found)
    files["train"], cut, whole = train.write(identity.get(TRAIN_SEQUENCES))
    if not files["train"]:
        raise too_small(data, f"all {len(documents)} documents are in select and report")
    for name, (packed, origin) in found.parts.items():
        files[name] = [arrow.write_table(store, f"{name}-00000.arrow", packed, origin)]
        cut += packed.cut
    manifest = _manifest(data, tokenizer, identity, shards, documents, cut, files, whole)
    store.write_json(MANIFEST, manifest)
    return manifest


def write_train(
    shard: Shard,
    name: str,
    rows: NDArray[np.int64],
    store: Store,
    length: int,
    packing: pack.Packing,
) -> tuple[arrow.FileInfo | None, int]:
    """Tokenise and pack documents `rows` of a shard, in that order, and publish them; a task.

    None when no sequence has a position to learn from; and how many conversations were cut.
    """
    tokenizer = tokenizers_.load_tokenizer(store.fetch_folder(TOKENIZER))
    ids = tokenizers_.encode(tokenizer, read_in_order(shard, rows), shard.label)
    packed = pack.pack(ids, length, packing, tokenizers_.pad_id(tokenizer))
    if len(packed) == 0:
        return None, packed.cut
    origin = np.full(len(packed), shard.source, dtype=np.int16)
    return arrow.write_table(store, name, packed, origin), packed.cut


@dataclass(frozen=True)
class _Parts:
    """What select and report are made of.

    parts: by name the sequences and their sources. used: documents that they use up, from the front
    of the order. tokens_per_byte: of the documents at the front, with padding.
    """

    parts: dict[str, tuple[pack.Packed, NDArray[np.int16]]]
    used: int
    tokens_per_byte: float


@dataclass(frozen=True)
class _Train:
    """Writes the train part, of the documents behind those that the held-out parts use up."""

    data: DataSpec
    shards: list[Shard]
    documents: Documents
    store: Store
    each: Each
    held_out: _Parts

    def write(self, wanted: int | None) -> tuple[list[arrow.FileInfo], int, bool]:
        """The files of at least `wanted` sequences, as far as there are so many; how many
        conversations were cut; whether all documents are in them. None: all documents.

        How many documents are needed is estimated, and again from what they gave if too few.
        """
        sizes = np.cumsum(self.documents.sizes[self.held_out.used :])
        if wanted is None or not len(sizes):
            return *self._write("train-{:05d}.arrow"), True
        size = wanted * self.data.sequence_length / self.held_out.tokens_per_byte
        while True:
            size *= SPARE
            count = int(np.searchsorted(sizes, size)) + 1
            if count >= len(sizes) or sizes[count - 1] > NEARLY_ALL * sizes[-1]:
                return *self._write("train-{:05d}.arrow"), True
            # Another try has other names: who makes the same corpus at the same time may be done.
            name = f"train-{count}-{{:05d}}.arrow"
            files, cut = self._write(name, self.held_out.used + count)
            found = sum(file.sequences for file in files)
            if found >= wanted:
                return files, cut, False
            for file in files:
                self.store.delete(file.name)
            size = max(size, float(sizes[count - 1])) * min(wanted / max(found, 1), 2.0)

    def _write(self, name: str, stop: int | None = None) -> tuple[list[arrow.FileInfo], int]:
        """Files of the documents before `stop`, in the order of their hashes; or of all, as the
        sources have them."""
        data = self.data
        by_shard = self.documents.rows_by_shard(self.held_out.used, stop, ascending=stop is None)
        calls = [
            (shard, name.format(number), rows, self.store, data.sequence_length, data.packing)
            for number, (shard, rows) in enumerate(zip(self.shards, by_shard, strict=True))
            if len(rows)
        ]
        written = self.each(write_train, calls)
        files = [file for file, _ in written if file is not None]
        return files, sum(number for _, number in written)


@dataclass(frozen=True)
class _HeldOut:
    """Fills select, then report, from the front of the documents' hash order, to the token."""

    data: DataSpec
    shards: list[Shard]
    documents: Documents
    each: Each

    def with_trained(self, vocab_size: int, folder: Path) -> tuple[Any, _Parts]:
        """Train a tokenizer on documents that no held-out part has, then fill the parts.

        How many documents the parts need is known only once there is a tokenizer, so a guess is
        reserved for them, and made larger until it holds.
        """
        reserved = min(self._prefix(BYTES_PER_TOKEN), len(self.documents) // 2)
        while True:
            tokenizers_.train_tokenizer(self._training_texts(reserved), vocab_size, folder)
            tokenizer = tokenizers_.load_tokenizer(folder)
            found = self.select_and_report(tokenizer)
            if found.used <= reserved:
                return tokenizer, found
            reserved = found.used + found.used // 20
            if reserved >= len(self.documents):
                raise too_small(
                    self.data,
                    f"{found.used} of the {len(self.documents)} documents are needed for them",
                )

    def select_and_report(self, tokenizer: PreTrainedTokenizerBase) -> _Parts:
        """Both parts. Raises ValueError where there are too few documents for them."""
        data, pad = self.data, tokenizers_.pad_id(tokenizer)
        stop, start = self._prefix(BYTES_PER_TOKEN), 0
        ids: list[pack.Document] = []
        while True:
            ids += tokenizers_.encode(tokenizer, self._read(start, stop), "data.train")
            parts, used = {}, 0
            for name in ("select", "report"):
                count = getattr(data, f"{name}_sequences")
                taken = pack.take_part(ids[used:], count, data.sequence_length, data.packing, pad)
                if taken is None:
                    break
                packed, documents = taken
                origin = self._sources(packed.documents + used)
                parts[name] = (packed, origin)
                used += documents
            if len(parts) == 2:
                tokens = pack.laid_tokens(ids, data.sequence_length)
                return _Parts(parts, used, tokens / int(self.documents.sizes[: len(ids)].sum()))
            if stop == len(self.documents):
                tokens = sum(map(len, ids))
                raise too_small(data, f"the corpus has {tokens:,} in {stop} documents")
            start, stop = stop, min(2 * stop, len(self.documents))

    def _prefix(self, bytes_per_token: float) -> int:
        """Documents from the front that hold the parts if a token has so many bytes."""
        data = self.data
        tokens = (data.select_sequences + data.report_sequences) * data.sequence_length
        ends = np.cumsum(self.documents.sizes)
        return min(int(np.searchsorted(ends, tokens * bytes_per_token)) + 2, len(ends))

    def _sources(self, numbers: NDArray[np.int64]) -> NDArray[np.int16]:
        by_shard = np.array([shard.source for shard in self.shards], dtype=np.int16)
        return by_shard[self.documents.shards[numbers]]

    def _training_texts(self, reserved: int) -> list[str]:
        """Texts behind the reserved documents, from the end of the order, as many as are used."""
        from_end = np.cumsum(self.documents.sizes[::-1])
        most = int(np.searchsorted(from_end, TOKENIZER_BYTES)) + 1
        start = max(reserved, len(self.documents) - most)
        read = self._read(start, len(self.documents))
        texts = (
            [document] if isinstance(document, str) else document.texts
            for document in read
            if not isinstance(document, list)
        )
        return [text for several in texts for text in several]

    def _read(self, start: int, stop: int) -> list[Document]:
        """Documents [start, stop) of the hash order."""
        by_shard = self.documents.rows_by_shard(start, stop)
        busy = [number for number, rows in enumerate(by_shard) if len(rows)]
        read = self.each(read_rows, [(self.shards[n], by_shard[n]) for n in busy])
        found = {
            (number, int(row)): document
            for number, documents in zip(busy, read, strict=True)
            for row, document in zip(by_shard[number], documents, strict=True)
        }
        places = zip(
            self.documents.shards[start:stop].tolist(),
            self.documents.rows[start:stop].tolist(),
            strict=True,
        )
        return [found[place] for place in places]


def _manifest(
    data: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    identity: dict[str, Any],
    shards: list[Shard],
    documents: Documents,
    cut: int,
    files: dict[str, list[arrow.FileInfo]],
    whole: bool,
) -> dict[str, Any]:
    import tokenizers
    import transformers

    of_source = np.array([shard.source for shard in shards], dtype=np.int64)
    per_source = [
        {
            "source": source.source,
            "read": int(documents.read[of_source == index].sum()),
            "filtered": int(documents.filtered[of_source == index].sum()),
            "duplicate": int(documents.duplicate[of_source == index].sum()),
        }
        for index, source in enumerate(data.train)
    ]
    return {
        "format": FORMAT,
        "identity": identity,
        "sequence_length": data.sequence_length,
        "packing": data.packing,
        "vocab_size": tokenizers_.vocabulary_size(tokenizer),
        "eos_id": int(tokenizer.eos_token_id),
        "pad_id": tokenizers_.pad_id(tokenizer),
        "parts": {
            name: {
                "sequences": sum(file.sequences for file in files[name]),
                "loss_tokens": sum(file.loss_tokens for file in files[name]),
                "files": [file.as_dict() for file in files[name]],
            }
            for name in PARTS
        },
        "whole": whole,  # all documents are in it, so there is no more of train
        "documents": {
            "read": int(documents.read.sum()),
            "filtered": int(documents.filtered.sum()),
            "duplicate": int(documents.duplicate.sum()),
            "kept": len(documents),
            "cut": cut,
        },
        "sources": per_source,
        "versions": {
            "tokenizers": tokenizers.__version__,
            "transformers": transformers.__version__,
        },
    }
