"""Answers that a file brings: checked, and copied to where answers are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.corpus.conversations import conversation, prompt_completion
from trainer.corpus.size import check_size
from trainer.corpus.sources import TOOLS, refuse_tools
from trainer.responses.store import FILE_BYTES, AnswerStore, answers_path
from trainer.spec.responses import AnswersFile
from trainer.spec.sections import DataSpec, SourceSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["messages", "prompt_completion"]


def format_of(path: Path) -> Format:
    """What the rows of a file are, by its first one. Raises ValueError, one line."""
    for _, row, _ in _rows(path):
        if "messages" in row:
            return "messages"
        if "prompt" in row and "completion" in row:
            return "prompt_completion"
        raise ValueError(
            f"responses.from.file: {path} has rows with {', '.join(row) or 'nothing'}; may be "
            "messages, or prompt and completion"
        )
    raise ValueError(f"responses.from.file: {path} is empty; may hold rows with messages")


def check_file(origin: AnswersFile) -> bool:
    """Whether rows of the file have messages.

    Raises ValueError, one line, for a file that is not there, and for the first row that is wrong.
    """
    path = answers_path(origin)
    kind = format_of(path)
    is_chat = kind == "messages"
    for number, row, _ in _rows(path):
        _check(f"responses.from.file: {path}: line {number}", row, kind)
        is_chat = is_chat or isinstance(row["prompt"], list)
    return is_chat


def check_answers_size(
    origin: AnswersFile, data: DataSpec, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises ValueError, one line, where the answers of a file cannot fill the corpus's parts."""
    path = answers_path(origin)
    source = SourceSpec(source=str(path), format=format_of(path))
    try:
        check_size(data.model_copy(update={"train": [source]}), tokenizer)
    except ValueError as error:
        why = str(error).replace("add sources to data.train", "give more answers")
        raise ValueError(f"responses.from.file: {path}: {why}") from None


def copy_file(origin: AnswersFile, answers: AnswerStore) -> dict[str, Any]:
    """Publishes the rows of the file; returns facts for the manifest.

    Raises ValueError, one line that names the line of the file, for a row that cannot be learnt.
    """
    path = answers_path(origin)
    kind = format_of(path)
    lines: list[bytes] = []
    size = rows = 0
    files: list[dict[str, Any]] = []
    for number, row, line in _rows(path):
        _check(f"responses.from.file: {path}: line {number}", row, kind)
        lines.append(line)
        size += len(line)
        rows += 1
        if size >= FILE_BYTES:
            files.append(answers.write_file(0, len(files), lines))
            lines, size = [], 0
    if lines:
        files.append(answers.write_file(0, len(files), lines))
    return {"rows": kind, "counts": {"answers": rows}, "files": files}


def _check(where: str, row: dict[str, Any], kind: Format) -> None:
    refuse_tools(where, row.get(TOOLS))
    if kind == "messages":
        found: Any = conversation(where, row.get("messages"))
    else:
        found = prompt_completion(where, row.get("prompt"), row.get("completion"))
    if found.is_empty:
        raise ValueError(f"{where}: holds no answer")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any], bytes]]:
    """(number from 1, row, the line with its end) of all lines that are not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"responses.from.file: {path}: line {number} is no JSON object")
            yield number, row, line.strip() + b"\n"
