"""What a corpus is made from: the name of its folder, and what two of them differ in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.corpus.sources import fingerprint
from trainer.spec.sections import DataSpec

FORMAT = 1
SEED = 0  # fixed, so that jobs with other seeds share the corpus and are judged on the same report
TRAIN_SEQUENCES = "train_sequences"  # in the identity: at least so many sequences of train


def corpus_identity(
    data: DataSpec, tokenizer: Mapping[str, Any], train_sequences: int | None = None
) -> dict[str, Any]:
    """Everything that decides the sequences, flat, so that two can be compared key by key.

    `tokenizer`: its identity, flat. train_sequences: as many of train as will be read; None: all
    that there are. Weights and max_tokens are not in it: they decide how often sequences are read.
    """
    identity: dict[str, Any] = {"format": FORMAT, "seed": SEED}
    if train_sequences is not None:
        identity[TRAIN_SEQUENCES] = train_sequences
    for key, value in settings(data).items():
        identity[f"data.{key}"] = value
    for index, source in enumerate(data.train):
        for key, value in fingerprint(source, index).items():
            identity[f"data.train.{index}.{key}"] = value
    return {**identity, **{f"tokenizer.{key}": value for key, value in tokenizer.items()}}


def of_held_out(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What of a corpus's identity decides the sequences of select and report."""
    return {key: value for key, value in identity.items() if key != TRAIN_SEQUENCES}


def settings(data: DataSpec) -> dict[str, Any]:
    """What of `data`, beside its sources, decides the sequences."""
    return data.model_dump(exclude={"max_tokens", "train", "corpus"})


def has_all(manifest: Mapping[str, Any]) -> bool:
    """Whether a corpus has all documents of its sources, so that no other one has more of train."""
    return bool(manifest.get("whole", True))
