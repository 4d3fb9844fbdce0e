"""What exactly the answers of a job are: a flat mapping, and the corpus that is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.fingerprint import flatten
from trainer.models import hash_files
from trainer.responses.store import FORMAT
from trainer.spec import AnswersEndpoint, AnswersFile, DataSpec, ResponsesSpec

# Keys of `responses` that decide a generated answer.
SETTINGS = ("max_new_tokens", "temperature", "top_p", "samples", "seed")


def responses_identity(
    responses: ResponsesSpec,
    data: DataSpec,
    teacher: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that decides the answers; flat.

    teacher, tokenizer: their identities (`Identities.teacher`, `Identities.tokenizer`). How fast a
    server is asked, and with which key, is no part of it. Raises ValueError for a source or a file
    that is not there.
    """
    from trainer.corpus import sources

    identity: dict[str, Any] = {"format": FORMAT}
    origin = responses.origin
    if isinstance(origin, AnswersFile):
        return {**identity, "from": "file", "content": hash_files([answers_path(origin)])}
    for index, source in enumerate(data.train):
        identity |= flatten(sources.fingerprint(source, index), f"data.train.{index}")
    identity |= {name: getattr(responses, name) for name in SETTINGS}
    if isinstance(origin, AnswersEndpoint):
        return {
            **identity,
            "from": "endpoint",
            "endpoint": origin.endpoint.rstrip("/"),
            "model": origin.model,
        }
    # What a model says after messages is also a matter of its chat template.
    template = {key: tokenizer[key] for key in sorted(tokenizer)}
    return {
        **identity,
        "from": "teacher",
        **flatten(dict(teacher), "teacher"),
        **flatten(template, "tokenizer"),
    }


def answers_path(origin: AnswersFile) -> Path:
    """The file of answers. Raises ValueError, one line, if it is not there."""
    path = Path(origin.file).expanduser()
    if not path.is_file():
        raise ValueError(f"responses.from.file: no file {origin.file}; give a .jsonl of answers")
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"responses.from.file: got {origin.file}; may be a .jsonl file")
    return path


def corpus_of_answers(
    data: DataSpec, tokenizer: Mapping[str, Any], answers: Mapping[str, Any]
) -> dict[str, Any]:
    """The identity of the corpus that is made of answers; flat; `answers`: `responses_identity`."""
    from trainer.corpus.prepare import corpus_identity

    without = data.model_copy(update={"train": []})
    return {**corpus_identity(without, tokenizer), **flatten(dict(answers), "responses")}
