"""Conversations as tokens, and which of those are the assistant's: rendered by the chat template.

    ids, learnt = render(tokenizer, conversation)

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                                         ^^^^^^^^^^^^^^^      learnt

Learnt is what the assistant must say by itself: from where a generation prompt ends to the token
that ends the turn, that one included; white space behind it is the template's. A template with
`{% generation %}` says itself what that is (an end-of-turn token right behind it is learnt too).
Of any other template every turn is rendered twice, as a prompt and whole, and both must be
beginnings of the conversation. A template that rewrites earlier turns, as those of thinking models
do, breaks that: then those turns are not learnt, only the last one and any that stand as they were
said. Where the template writes no token at the end, the end-of-text token is put there and learnt.
Texts are tokenised whole, and a token that lies across a boundary is its right side's.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.corpus import sources
from trainer.corpus.conversations import Conversation, Pair, Row
from trainer.corpus.packing import Labelled
from trainer.spec.sections import DataSpec, TokenizerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(
    tokenizer: PreTrainedTokenizerBase, row: Row
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Token ids of a row, int32 [n], and which of them are learnt, bool [n].

    Raises ValueError, one line that names the row, where the chat template cannot render it or
    does not show what is the assistant's.
    """
    labelled = Chat(tokenizer).labelled(row)
    return labelled.ids, labelled.learnt


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of messages up to where the assistant's answer begins. Raises ValueError."""
    chat = Chat(tokenizer)
    return chat.encode(chat.text("prompt", messages, prompt=True)).tolist()


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether conversations can be rendered with this tokenizer (or TokenizerSpec)."""
    return not isinstance(tokenizer, TokenizerSpec) and bool(tokenizer.chat_template)


def chat_faults(data: DataSpec, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One line for each source that needs a chat template where the tokenizer has none.

    tokenizer: one that is loaded, or the TokenizerSpec of one to be trained. Raises ValueError as
    `sources.resolve` and `sources.read_documents`.
    """
    if has_template(tokenizer):
        return []
    if isinstance(tokenizer, TokenizerSpec):
        name = "a tokenizer that is trained on the corpus (tokenizer.train)"
    else:
        name = f"the tokenizer {tokenizer.name_or_path}"
    return [
        f"data.train.{index}.format: {_named(source.format)} needs a chat template, which "
        f"{name} does not have; give format: prompt_completion with texts, or a model with a "
        "chat template"
        for index, source in enumerate(data.train)
        if source.format == "messages"
        or (source.format == "prompt_completion" and _of_messages(data, index))
    ]


def _named(format: str) -> str:
    return format if format == "messages" else f"{format} of messages"


def _of_messages(data: DataSpec, index: int) -> bool:
    """Whether the first row of a source that is not empty has messages, not texts."""
    for shard in sources.resolve(data.train[index], index):
        for row in sources.read_documents(shard):
            if isinstance(row, Conversation) or (isinstance(row, Pair) and not row.is_empty):
                return isinstance(row, Conversation)
    return False


class Chat:
    """Rendering with one tokenizer; it looks once at the template and the control tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._eos = int(tokenizer.eos_token_id)

    @cached_property
    def _template(self) -> str:
        if not has_template(self._tokenizer):
            raise ValueError(f"the tokenizer {self._tokenizer.name_or_path} has no chat template")
        return str(self._tokenizer.get_chat_template())

    @cached_property
    def _control(self) -> tuple[str, ...]:
        """The texts of all tokens that stand outside of the vocabulary's words."""
        added = self._tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.content)

    def labelled(self, row: Row) -> Labelled:
        """The row as tokens. Raises ValueError, one line that names the row."""
        if isinstance(row, Pair):
            ids = self.encode(row.prompt + row.completion, special=True)
            first = _common(ids, self.encode(row.prompt, special=True))
            return self._ended(ids, np.arange(len(ids)) >= first, closed=bool(ids[-1] == self._eos))
        text, spans = self._marked(row) if self._is_marked else self._compared(row)
        ids = self.encode(text)
        learnt = np.zeros(len(ids), bool)
        for start, stop in spans:
            first, last = (_common(ids, self.encode(text[:at])) for at in (start, stop))
            learnt[first:last] = True
        if not learnt.any():
            raise ValueError(f"{row.where}: the chat template gives the assistant no token to say")
        end = spans[-1][1]
        closed = bool(text[end:].strip()) or text[:end].endswith(self._control)
        return self._ended(ids, learnt, closed)

    def text(self, where: str, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        """Messages as the template writes them. Raises ValueError, one line."""
        return self._rendered(where, messages, prompt)[0]

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.int32]:
        """Token ids: int32 [n]. special: with those that the tokenizer puts around a text; what a
        template writes has them already."""
        encoding = self._backend.encode_batch_fast([text], add_special_tokens=special)[0]
        return np.array(encoding.ids, dtype=np.int32)

    @cached_property
    def _is_marked(self) -> bool:
        return _GENERATION.search(self._template) is not None

    def _ended(self, ids: NDArray[np.int32], learnt: NDArray[np.bool_], closed: bool) -> Labelled:
        if closed:
            return Labelled(ids, learnt)
        return Labelled(np.append(ids, np.int32(self._eos)), np.append(learnt, True))

    def _rendered(
        self, where: str, messages: list[dict[str, str]], prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and what `{% generation %}` marks of it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            special: Any = self._tokenizer.special_tokens_map
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=self._template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self._is_marked,
                **special,
            )
        except Exception as error:  # a template is a program, and raises what it likes
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{where}: the chat template refuses it: {reason}") from error
        texts, spans = rendered
        return texts[0], [(start, stop) for start, stop in spans[0]] if spans else []

    def _marked(self, row: Conversation) -> tuple[str, list[Span]]:
        """The text and the assistant's spans by the template's own marks."""
        text, spans = self._rendered(row.where, row.dicts())
        turns = [i for i, (role, _) in enumerate(row.messages) if role == "assistant"]
        prompt_turns = sum(turn < row.prompt for turn in turns)
        if prompt_turns and len(spans) != len(turns):
            raise ValueError(
                f"{row.where}: the chat template marks {len(spans)} spans of {len(turns)} turns of "
                "the assistant, so the prompt's cannot be told from the completion's"
            )
        return text, [(start, self._end(text, start, stop)) for start, stop in spans[prompt_turns:]]

    def _end(self, text: str, start: int, stop: int) -> int:
        """Where a marked span ends, with its end-of-turn token, which may be right behind it."""
        said = self._said(text[:stop], start)
        if text[:said].endswith(self._control):
            return said
        behind = [token for token in self._control if text.startswith(token, stop)]
        return stop + max(map(len, behind), default=0)

    def _compared(self, row: Conversation) -> tuple[str, list[Span]]:
        """The text and the assistant's spans by renderings of its beginnings."""
        where, text = row.where, self.text(row.where, row.dicts())
        last = len(row.messages) - 1
        spans = []
        for turn, (role, _) in enumerate(row.messages):
            if role != "assistant" or turn < row.prompt or (turn == 0 and turn < last):
                continue
            if turn == 0:
                raise ValueError(f"{where}: nothing comes before the assistant's turn")
            whole = text if turn == last else self._or_none(row, turn + 1, prompt=False)
            begun = self._or_none(row, turn, prompt=True)
            if whole is None or begun is None or not text.startswith(whole):
                continue  # rewritten by what follows
            if whole.startswith(begun) and len(begun) < len(whole):
                spans.append((len(begun), self._said(whole, len(begun))))
            elif turn == last:
                raise ValueError(
                    f"{where}: the chat template writes its generation prompt otherwise than the "
                    f"turn that follows ({_differing(begun, whole)}), so what the assistant says "
                    "cannot be told; use a template with {% generation %}"
                )
        if not spans:
            raise ValueError(f"{where}: the chat template gives the assistant no token to say")
        return text, spans

    def _or_none(self, row: Conversation, stop: int, *, prompt: bool) -> str | None:
        """The first messages rendered; of those before the last turn None where they cannot be."""
        try:
            return self.text(row.where, row.dicts(stop), prompt=prompt)
        except ValueError:
            if prompt and stop == len(row.messages) - 1:
                raise
            return None

    def _said(self, whole: str, start: int) -> int:
        """Where the turn from `start` on ends: without white space behind its end-of-turn token."""
        said = whole[start:].rstrip()
        return start + len(said) if said.endswith(self._control) else len(whole)


def _common(ids: NDArray[np.int32], others: NDArray[np.int32]) -> int:
    """How many tokens both begin with."""
    size = min(len(ids), len(others))
    differing = np.flatnonzero(ids[:size] != others[:size])
    return int(differing[0]) if len(differing) else size


def _differing(one: str, other: str) -> str:
    """Both texts from where they differ on, for an error."""
    size = min(len(one), len(other))
    at = next((i for i in range(size) if one[i] != other[i]), size)
    return f"{one[at : at + 20]!r} against {other[at : at + 20]!r}"
