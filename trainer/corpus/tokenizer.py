"""Tokenizers: load one, train one, compare two, copy their files, and turn documents into token
ids.

Always the transformers fast tokenizers; its files are what a student folder carries.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.corpus import packing, sources
from trainer.corpus.chat_template import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"
PAD = "<|pad|>"
BATCH_DOCUMENTS = 512
# Files of a model folder at a URL that a tokenizer may need; the weights stay where they are.
SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> Path:
    """Train a byte-level BPE of exactly `vocab_size` entries and save it for AutoTokenizer.

    `<|endoftext|>` (id 0) ends documents, `<|pad|>` (id 1) pads, nothing begins one.

    Raises:
        ValueError: the texts hold too few different words for so many entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        least = 256 + 2
        why = (
            f"256 bytes and {least - 256} special tokens need at least {least}"
            if reached > vocab_size
            else f"the corpus gives {reached} entries; lower it, or add sources"
        )
        raise ValueError(f"tokenizer.train: got {vocab_size}; {why}")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return Path(folder)


def load_tokenizer(path: str | os.PathLike[str], revision: str = "main") -> PreTrainedTokenizerBase:
    """The fast tokenizer of a hub id, a local folder or the URL of a folder.

    Raises:
        ValueError: it cannot be found, is not a fast one, or has no end-of-text token.
    """
    from transformers import AutoTokenizer

    name = os.fspath(path)
    try:
        if "://" in name:
            with tempfile.TemporaryDirectory() as folder:
                _download(name, Path(folder))
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=False
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no tokenizer in {name!r}: {reason}; give a hub id that can be reached from here, or "
            "a folder with tokenizer.json and tokenizer_config.json"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{name}: only fast tokenizers (tokenizer.json) are supported")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: the tokenizer has no eos_token, which must end every document")
    tokenizer.backend_tokenizer.no_truncation()  # as saved for some other use, both would
    tokenizer.backend_tokenizer.no_padding()  # change the documents
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; the end-of-text id where there is none."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def check_same_vocabulary(
    teacher: str | os.PathLike[str],
    student: str | os.PathLike[str],
    teacher_revision: str = "main",
    student_revision: str = "main",
) -> None:
    """Refuse a teacher and a student whose tokenizers give tokens different ids.

    Their embeddings may have different numbers of rows. Raises ValueError naming the first tokens
    that differ, by id.
    """
    ours = load_tokenizer(student, student_revision).get_vocab()
    theirs = load_tokenizer(teacher, teacher_revision).get_vocab()
    if ours == theirs:
        return
    differing = [
        (min(ours.get(token, 2**31), theirs.get(token, 2**31)), token)
        for token in ours.keys() | theirs.keys()
        if ours.get(token) != theirs.get(token)
    ]
    shown = ", ".join(
        f"{token!r} ({theirs.get(token, 'none')} in the teacher, {ours.get(token, 'none')} in the "
        "student)"
        for _, token in sorted(differing)[:3]
    )
    raise ValueError(
        f"student.model: {student} and teacher.model: {teacher} have different vocabularies of "
        f"{len(ours)} and {len(theirs)} tokens, {len(differing)} differ: {shown}; "
        "use a student of the teacher's family"
    )


def encode(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[sources.Document], label: str
) -> list[packing.Document]:
    """Token ids of documents, each ended by the end-of-text token; see `chat` for conversations.

    Text gets the tokens that the tokenizer itself puts around it (a model that begins every text
    with a token needs it here too). Special tokens written out in the text are recognised.

    Raises:
        ValueError: a document of token ids holds one outside the vocabulary, or a conversation
            cannot be rendered.
    """
    eos, size = int(tokenizer.eos_token_id), vocabulary_size(tokenizer)
    backend = tokenizer.backend_tokenizer
    chat = Chat(tokenizer)
    result: list[packing.Document] = []
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        batch = documents[start : start + BATCH_DOCUMENTS]
        texts = [document for document in batch if isinstance(document, str)]
        encoded = iter(backend.encode_batch_fast(texts)) if texts else iter(())
        for document in batch:
            if not isinstance(document, (str, list)):
                result.append(chat.labelled(document))
                continue
            raw = next(encoded).ids if isinstance(document, str) else document
            ids = np.array(raw, dtype=np.int64)
            if not isinstance(document, str) and (ids.min() < 0 or ids.max() >= size):
                wrong = int(ids[(ids < 0) | (ids >= size)][0])
                raise ValueError(
                    f"{label}: token id {wrong} is outside the tokenizer's vocabulary of {size}"
                )
            if len(ids) == 0 or ids[-1] != eos:
                ids = np.append(ids, eos)
            result.append(ids.astype(np.int32))
    return result


def _download(url: str, folder: Path) -> None:
    from cluster.storage import open_store

    store = open_store(url)
    for name in store.list():
        if name.endswith(SUFFIXES) and not name.endswith(".index.json"):
            (folder / name).write_bytes(store.read_bytes(name))


TEMPLATES = "additional_chat_templates"  # a folder, as transformers.utils.hub calls it
VOCABULARIES = {  # any of which a tokenizer can be read from
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
}
OTHERS = {
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
}


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file (or the folder of chat templates) is a tokenizer's."""
    if path.is_dir():
        return path.name == TEMPLATES
    return path.name in VOCABULARIES | OTHERS or path.suffix == ".tiktoken"


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer's vocabulary is there."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what a tokenizer is read from, with its chat templates."""
    for path in sorted(source.iterdir()):
        if is_tokenizer_file(path):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, target / path.name)
