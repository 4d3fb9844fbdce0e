"""What exactly the answers of a job are: a flat mapping, and the corpus that is made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.fingerprint import flatten
from trainer.models.load import hash_files
from trainer.responses.store import FORMAT
from trainer.spec.sections import AnswersEndpoint, AnswersFile, DataSpec, ResponsesSpec

# Keys of `responses` that decide a generated answer.
SETTINGS = ("max_new_tokens", "temperature", "top_p", "samples", "seed")


def responses_identity(
    responses: ResponsesSpec,
    data: DataSpec,
    teacher: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    folder: Path | None = None,
) -> dict[str, Any]:
    """Everything that decides the answers; flat.

    teacher, tokenizer: their identities (`Identities.teacher`, `Identities.tokenizer`). How fast a
    server is asked, and with which key, is no part of it. folder: the teacher's.
    Raises ValueError for a source or a file that is not there.
    """
    from trainer.corpus import sources

    identity: dict[str, Any] = {"format": FORMAT}
    origin = responses.origin
    if isinstance(origin, AnswersFile):
        content = hash_files([answers_path(origin)])
        rendering = {"rendering": sources.RENDERING}
        return {**identity, "from": "file", "content": content, **rendering}
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
        "ends": _generation_ends(folder),
    }


def _generation_ends(folder: Path | None) -> str:
    """The ids that end an answer by generation_config.json, which is in no other identity."""
    path = None if folder is None else folder / "generation_config.json"
    if path is None or not path.is_file():
        return "null"
    try:
        return json.dumps(json.loads(path.read_text()).get("eos_token_id"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"teacher.model: {path} cannot be read as JSON ({error})") from None


def answers_path(origin: AnswersFile) -> Path:
    """The file of answers. Raises ValueError, one line, if it is not there."""
    path = Path(origin.file).expanduser()
    if not path.is_file():
        raise ValueError(f"responses.from.file: no file {origin.file}; give a .jsonl of answers")
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"responses.from.file: got {origin.file}; may be a .jsonl file")
    return path


def corpus_of_answers(
    data: DataSpec,
    tokenizer: Mapping[str, Any],
    answers: Mapping[str, Any],
    train_sequences: int | None = None,
) -> dict[str, Any]:
    """What is asked of the corpus that is made of answers; flat; `answers`: `responses_identity`.

    Which answers there are is known once they are made: `corpus_of_content` has both.
    """
    from trainer.corpus.prepare import corpus_identity

    without = data.model_copy(update={"train": []})
    corpus = corpus_identity(without, tokenizer, train_sequences)
    return {**corpus, **flatten(dict(answers), "responses")}


def corpus_of_content(asked: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the corpus of the very answers that a manifest names: other answers to the
    same prompts are another corpus. asked: `corpus_of_answers`."""
    digest = hashlib.blake2b(digest_size=16)
    for file in manifest["files"]:
        digest.update(f"{file['name']}\0{file['blake2b']}\0".encode())
    return {**asked, "responses.answers": digest.hexdigest()}
