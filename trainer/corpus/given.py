"""A corpus that is in storage already, named in the spec: where its sources are not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.storage import Store
from trainer.corpus.corpus import TRAIN_SEQUENCES, open_corpus
from trainer.fingerprint import fingerprint
from trainer.spec import DataSpec


def given_identity(
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


def of_held_out(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What of a corpus's identity decides the sequences of select and report."""
    return {key: value for key, value in identity.items() if key != TRAIN_SEQUENCES}


def has_all(manifest: Mapping[str, Any]) -> bool:
    """Whether a corpus has all documents of its sources, so that no other one has more of train."""
    return bool(manifest.get("whole", True))


def settings(data: DataSpec) -> dict[str, Any]:
    """What of `data`, beside its sources, decides the sequences."""
    return data.model_dump(exclude={"max_tokens", "train", "corpus"})
