"""Prompts: what of the rows of `data.train` is answered, and by which key an answer is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.corpus import sources
from trainer.corpus.conversations import Conversation, prompt_completion
from trainer.spec.sections import DataSpec, SourceSpec

Message = dict[str, str]
# The column that holds a source's prompts, where the source names none.
COLUMNS = {"messages": "messages", "prompt_completion": "prompt"}


@dataclass(frozen=True)
class Prompt:
    """What is answered: a text to go on with, or messages of which the last is the user's.

    source: index in `data.train`. key: blake2b-128 of the prompt, the same wherever it stands.
    """

    source: int
    value: str | list[Message]
    key: bytes

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.value, str)

    def answer_key(self, sample: int) -> str:
        """The name of the prompt's answer number `sample`: 32 hex digits."""
        text = self.key + sample.to_bytes(4, "little")
        return hashlib.blake2b(text, digest_size=16).hexdigest()

    def completion(self, text: str) -> str | list[Message]:
        """An answer in the form of the prompt: a text, or the assistant's message."""
        return [{"role": "assistant", "content": text}] if self.is_chat else text


def prompt_key(value: str | list[Message]) -> bytes:
    """blake2b-128 of a prompt's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def read_prompts(data: DataSpec) -> list[Prompt]:
    """The distinct prompts of all sources, in the order of sources and rows.

    Rows without a prompt (null or empty) are left out; of equal prompts the first stays.
    Raises ValueError, one line, for a source that is not there and for a row that holds no prompt.
    """
    found: dict[bytes, Prompt] = {}
    for index, source in enumerate(data.train):
        for value in _values(source, index):
            key = prompt_key(value)
            found.setdefault(key, Prompt(index, value, key))
    if not found:
        raise ValueError("data.train: holds no prompt; give rows with messages or with prompt")
    return list(found.values())


def check_prompts(data: DataSpec) -> dict[str, bool]:
    """Whether a source begins with messages, by its key; looks at first prompts alone.

    Raises ValueError, one line, unless every source is there and holds prompts.
    """
    chats = {}
    for index, source in enumerate(data.train):
        first = next(_values(source, index), None)
        if first is None:
            raise ValueError(f"data.train.{index}: {source.source} holds no prompt")
        chats[f"data.train.{index}"] = not isinstance(first, str)
    return chats


def _values(source: SourceSpec, index: int) -> Iterator[str | list[Message]]:
    column = source.column or COLUMNS[source.format]
    # As plain columns: a completion need not be there, and what a row holds is looked at here.
    plain = source.model_copy(update={"format": "text", "column": column})
    for shard in sources.resolve(plain, index):
        rows = sources.read_columns(shard, (sources.TOOLS,))
        for row, (value, tools) in enumerate(rows, start=shard.start):
            where = f"{shard.label}: row {row} of column {column!r}"
            sources.refuse_tools(f"{shard.label}: row {row}", tools)
            prompt = _of_messages(where, value) if source.format == "messages" else value
            if source.format == "prompt_completion" and value is not None:
                prompt = value if isinstance(value, str) else _of_messages(where, value)
            if prompt:
                yield prompt


def _of_messages(where: str, value: Any) -> list[Message]:  # noqa: ANN401
    """The messages up to the last one of the user; [] for a null. Raises ValueError.

    What is refused in a conversation that is learnt is refused here, before it is answered.
    """
    if value is None:
        return []
    users = [
        number
        for number, message in enumerate(value if isinstance(value, list) else [])
        if isinstance(message, dict) and message.get("role") == "user"
    ]
    prompt = value[: users[-1] + 1] if users else value
    row = prompt_completion(where, prompt, [{"role": "assistant", "content": "-"}])
    assert isinstance(row, Conversation)
    if prompt and not users:
        raise ValueError(f"{where} has no message of the user that could be answered")
    return row.dicts(row.prompt)
