"""Answers on storage: pieces while they are made, files in a fixed order once all are there.

    <storage>/_responses/<fingerprint>/
        pieces/<attempt>-<worker>-<hash>.jsonl     what one worker has published at one time
        files/answers-<source>-<number>.jsonl      the answers to data.train.<source>, by key
        manifest.json                              written last: what they are, and how they came

A row has prompt and completion (texts, or messages), key, source, sample, tokens and finish
("stop", or "length" where it was cut at max_new_tokens). What the files hold does not depend on
who made which answer when. Empty answers are left out of them, and so are assistant's turns that
were cut: they would teach to stop in the middle. A text that was cut stays; texts may go on.

`responses_identity` is what exactly the answers of a job are; it names the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.storage import Store
from cluster.storage.keys import flatten
from trainer.models.load import hash_files
from trainer.spec.responses import AnswersEndpoint, AnswersFile, ResponsesSpec
from trainer.spec.sections import DataSpec

FORMAT = 1
MANIFEST = "manifest.json"
PIECES, FILES = "pieces", "files"
# A file of answers is not larger than this and one row.
FILE_BYTES = 32 << 20
# Stands for the source of an answer that nobody learns from; it stays in its piece.
LEFT_OUT = -1


@dataclass(frozen=True)
class Answer:
    """One answer. tokens: generated, None where the server does not say."""

    key: str
    source: int
    sample: int
    prompt: str | list[dict[str, Any]]
    completion: str | list[dict[str, Any]]
    tokens: int | None
    finish: str

    def line(self) -> bytes:
        """The answer as a row of a file."""
        return json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "replace") + b"\n"


class AnswerStore:
    """The folder of the answers of one identity."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, None while answers are missing. Raises ValueError for another format."""
        if not self.store.exists(MANIFEST):
            return None
        manifest: dict[str, Any] = self.store.read_json(MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"the answers at {self.store.url} have format {manifest.get('format')}, this "
                f"version reads {FORMAT}; delete them to have them made again"
            )
        return manifest

    def keys(self) -> set[str]:
        """The keys of the answers that are there."""
        return {row["key"] for _, _, _, row in self._rows()}

    def publish(self, answers: Sequence[Answer], attempt: int, worker: int) -> None:
        """Makes answers last; the name is made of their content, so that doing it again is safe."""
        if not answers:
            return
        data = b"".join(answer.line() for answer in answers)
        name = hashlib.blake2b(data, digest_size=8).hexdigest()
        self.store.write_bytes(f"{PIECES}/{attempt:04d}-{worker:04d}-{name}.jsonl", data)

    def finish(self, facts: Mapping[str, Any], sources: int) -> dict[str, Any]:
        """Puts all answers into files ordered by key, and writes the manifest; returns it.

        facts: what the manifest says besides. sources: entries of `data.train`, each of which must
        have an answer (ValueError): the corpus numbers its sources as `data.train` does.
        """
        places: dict[str, tuple[int, str, int, int]] = {}
        counts = Counter({"answers": 0, "cut": 0, "empty": 0, "left_out": 0})
        for piece, start, stop, row in self._rows():
            if row["key"] in places:
                continue
            is_chat, cut = not isinstance(row["completion"], str), row["finish"] == "length"
            empty = not _text(row).strip()
            left_out = empty or (is_chat and cut)
            counts.update(answers=1, cut=int(cut), empty=int(empty), left_out=int(left_out))
            places[row["key"]] = (LEFT_OUT if left_out else row["source"], piece, start, stop)
        files: list[dict[str, Any]] = []
        for source in range(sources):
            keys = sorted(key for key, place in places.items() if place[0] == source)
            if not keys:
                raise ValueError(
                    f"data.train.{source}: no answer to learn from ({counts['answers']} answers of "
                    f"all sources, {counts['empty']} empty, {counts['cut']} cut at "
                    "responses.max_new_tokens; of chats those that were cut are left out)"
                )
            files += self._write(source, [places[key][1:] for key in keys])
        known = facts.get("counts", {})
        return self.seal({**facts, "counts": {**known, **counts}, "files": files})

    def write_file(self, source: int, number: int, lines: Sequence[bytes]) -> dict[str, Any]:
        """Publishes one file of answers; returns its entry in the manifest."""
        name = f"{FILES}/answers-{source:03d}-{number:05d}.jsonl"
        data = b"".join(lines)
        self.store.write_bytes(name, data)
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        entry = {"name": name, "source": source, "rows": len(lines), "bytes": len(data)}
        return {**entry, "blake2b": digest}

    def seal(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the manifest, after which nothing changes; returns it."""
        manifest = {"format": FORMAT, **facts}
        self.store.write_json(MANIFEST, manifest)
        return manifest

    def _rows(self) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        """(object, start, stop, row) of every answer that is there."""
        for name in self.store.glob(f"{PIECES}/*.jsonl"):
            start = 0
            with self.store.fetch(name).open("rb") as file:
                for line in file:
                    try:
                        row = json.loads(line)
                    except ValueError:
                        raise ValueError(
                            f"{self.store.path(name)}: byte {start}: no JSON; delete the file, and "
                            "its answers are made again"
                        ) from None
                    yield name, start, start + len(line), row
                    start += len(line)

    def _write(self, source: int, places: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
        written: list[dict[str, Any]] = []
        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            lines: list[bytes] = []
            size = 0

            for name, start, stop in places:
                if name not in opened:
                    opened[name] = stack.enter_context(self.store.fetch(name).open("rb"))
                opened[name].seek(start)
                lines.append(opened[name].read(stop - start))
                size += stop - start
                if size >= FILE_BYTES:
                    written.append(self.write_file(source, len(written), lines))
                    lines, size = [], 0
            if lines:
                written.append(self.write_file(source, len(written), lines))
        return written


def _text(row: Mapping[str, Any]) -> str:
    """What an answer says."""
    completion = row["completion"]
    return completion if isinstance(completion, str) else completion[0]["content"]


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
        "ends": _generation_end_ids(folder),
    }


def _generation_end_ids(folder: Path | None) -> str:
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
    from trainer.corpus.identity import corpus_identity

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
