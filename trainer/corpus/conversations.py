"""Rows of which only what the assistant says is learnt: conversations, and prompts with an answer.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    {"prompt": "2 + 2 =", "completion": " 4"}
    {"prompt": [{"role": "user", ...}], "completion": [{"role": "assistant", ...}]}

What comes after the last turn of the assistant is left out. Tools, images and every other key of a
message are refused, unless they are null.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
PROMPT, COMPLETION = "prompt", "completion"


@dataclass(frozen=True)
class Conversation:
    """Messages (role, content), the last of which is the assistant's; none for a null row.

    prompt: how many of them, from the first on, are given and not learnt. where: how an error
    names the row.
    """

    messages: tuple[tuple[str, str], ...]
    prompt: int = 0
    where: str = ""

    @property
    def texts(self) -> list[str]:
        """Everything that is said."""
        return [content for _, content in self.messages]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn: no turn of the assistant that says something."""
        learnt = self.messages[self.prompt :]
        return not any(role == "assistant" and content.strip() for role, content in learnt)

    @property
    def canonical(self) -> list[Any]:
        """What makes two rows equal."""
        return [self.prompt, [[role, _normal(content)] for role, content in self.messages]]

    def dicts(self, stop: int | None = None) -> list[dict[str, str]]:
        """The messages before `stop` as chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.messages[:stop]]


@dataclass(frozen=True)
class Pair:
    """A text and how it goes on; only the completion is learnt. where: as in `Conversation`."""

    prompt: str
    completion: str
    where: str = ""

    @property
    def texts(self) -> list[str]:
        """Everything that is said."""
        return [self.prompt, self.completion]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn."""
        return not self.completion.strip()

    @property
    def canonical(self) -> list[Any]:
        """What makes two rows equal."""
        return [_normal(self.prompt), _normal(self.completion)]


Row = Conversation | Pair


def measure_row(row: Row) -> tuple[bytes, int, int]:
    """(hash of 16 bytes, UTF-8 bytes, characters) of what is said in a row."""
    text = "\n".join(map(_normal, row.texts)).strip()
    data = json.dumps(row.canonical, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.blake2b(
        data.encode("utf-8", "surrogatepass"),
        digest_size=16,
        person=b"messages" if isinstance(row, Conversation) else b"prompt",
    )
    return digest.digest(), len(text.encode("utf-8", "surrogatepass")), len(text)


def conversation(where: str, value: object) -> Conversation:
    """The conversation in one value of a column; null or [] is an empty one.

    Raises ValueError, one line, for anything but messages with a turn of the assistant.
    """
    if not value and (value is None or isinstance(value, list)):
        return Conversation((), where=where)
    return _whole(where, _messages(where, value, "message"), 0)


def prompt_completion(where: str, prompt: object, completion: object) -> Row:
    """The row in the values of two columns; if both are null or [], an empty one.

    Raises ValueError, one line, where they are not two texts or two lists of messages.
    """
    if prompt in (None, []) and completion in (None, []):
        return Pair("", "", where)
    if isinstance(prompt, str) and isinstance(completion, str):
        return Pair(prompt, completion, where)
    if isinstance(prompt, list) and isinstance(completion, list):
        first = _messages(where, prompt, "prompt message")
        rest = _messages(where, completion, "completion message")
        return _whole(where, first + rest, len(first))
    raise ValueError(
        f"{where}: prompt is {_kind(prompt)} and completion is {_kind(completion)}; both may be "
        "texts, or both lists of {role, content}"
    )


def _whole(where: str, messages: list[tuple[str, str]], prompt: int) -> Conversation:
    answers = [i for i, (role, _) in enumerate(messages) if role == "assistant" and i >= prompt]
    if not answers:
        in_it = "completion" if prompt else "messages"
        found = ", ".join(dict.fromkeys(role for role, _ in messages[prompt:])) or "nothing"
        raise ValueError(
            f"{where}: no turn of the assistant in {in_it}, only {found}; remove the row, or give "
            "the turns to learn role: assistant"
        )
    return Conversation(tuple(messages[: answers[-1] + 1]), prompt, where)


def _messages(where: str, value: object, name: str) -> list[tuple[str, str]]:
    if not isinstance(value, list):
        raise ValueError(
            f"{where}: {_kind(value)} where a list of {{role, content}} should be; "
            "for plain texts set format: text"
        )
    return [_message(f"{where}: {name} {number}", item) for number, item in enumerate(value)]


def _message(where: str, item: object) -> tuple[str, str]:
    if not isinstance(item, dict):
        raise ValueError(f"{where} is {_kind(item)}; may be {{role, content}}")
    filled = {key: value for key, value in item.items() if value is not None}
    for key in ("role", "content"):
        if key not in filled:
            keys = ", ".join(filled) or "nothing"
            raise ValueError(f"{where} has no {key}, it has {keys}; may be {{role, content}}")
    role, content = filled["role"], filled["content"]
    if role not in ROLES:
        raise ValueError(f"{where} has role {role!r}; may be {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{where} has {_kind(content)} as content; may be a text")
    others = [key for key in filled if key not in ("role", "content")]
    if others:
        raise ValueError(
            f"{where} has {', '.join(others)}, which is not rendered; may be role and content "
            "alone (tool calls and parts that are not text are not supported)"
        )
    return role, content


def _kind(value: object) -> str:
    names = {str: "a text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()
