"""A tokenizer as llama.cpp takes it: tokens, their types, and what joins them.

llama.cpp has its own tokenizers (src/llama-vocab.cpp, github.com/ggml-org/llama.cpp), which a file
chooses by name. So what the tokenizer at hand really does is compared with what those do, and
anything else is refused: a wrong split would be a model that silently answers worse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer

from quant.export.gguf_bpe import byte_level, sentence_pieces


@dataclass
class Vocabulary:
    """What a file says about its tokenizer.

    model, pre: llama.cpp's names. tokens, types: one for each row of the embedding table. merges:
    "left right", for byte-level BPE; scores: for SentencePiece. special: "bos", "eos", ... -> id.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    space_prefix: bool | None = None
    chat_template: str | list[dict[str, str]] | None = None
    notes: list[str] = field(default_factory=list)

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_scores(self.scores)
        writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer in `folder`, for an embedding table of `rows` rows.

    It is read as transformers loads it, for that is what the model was trained with. Raises
    ValueError (one line) for a tokenizer that llama.cpp does not have.
    """
    tokenizer = _load(folder)
    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    where = str(folder / "tokenizer.json")
    made = sentence_pieces if spec["model"].get("byte_fallback") else byte_level
    try:
        found = made(spec)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    by_id = {number: text for text, number in backend.get_vocab().items()}
    if by_id and max(by_id) >= rows:
        raise ValueError(
            f"{where}: token {by_id[max(by_id)]!r} has id {max(by_id)}, but the model has "
            f"{rows} embeddings; resize_token_embeddings({max(by_id) + 1}) mends it"
        )
    tokens, types = [], []
    added = backend.get_added_tokens_decoder()
    for number in range(rows):
        text = by_id.get(number)
        if text is None:
            tokens.append(_unused(number, backend))
            types.append(TokenType.UNUSED)
            continue
        tokens.append(text)
        if number in added:
            special = added[number].special
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        else:
            types.append(found.type_of(text))
        if text == found.unknown:
            types[-1] = TokenType.UNKNOWN
    vocabulary = Vocabulary(found.model, found.pre, tokens, types, found.merges)
    vocabulary.scores = [found.score_of(text) for text in tokens] if found.scores else []
    vocabulary.space_prefix = found.space_prefix
    vocabulary.notes = list(found.notes)
    greedy = [str(t) for t in added.values() if t.lstrip or t.rstrip or t.single_word]
    if greedy:
        vocabulary.notes.append(
            f"llama.cpp leaves the whitespace around {', '.join(greedy[:3])} in place, which this "
            "tokenizer takes with the token"
        )
    _add_special(vocabulary, tokenizer, folder)
    vocabulary.chat_template = _chat_template(tokenizer)
    return vocabulary


def _load(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():
        held = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
        raise ValueError(
            f"{folder} has no tokenizer.json{f', only {held[0]}' if held else ''}; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) of a fast tokenizer writes one"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: the tokenizer cannot be read: {reason}") from error


def _unused(number: int, backend: Any) -> str:
    """A name for a row without a token, one that no token has: llama.cpp needs them different."""
    text = f"[PAD{number}]"
    while backend.token_to_id(text) is not None:
        text = f"[{text}]"
    return text


def _add_special(vocabulary: Vocabulary, tokenizer: Any, folder: Path) -> None:
    """Ids of the special tokens, and which of them the tokenizer puts around a text."""
    special = vocabulary.special
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            special[name] = int(number)
    if "eos" not in special:
        # llama.cpp would stop at some id of its own choice.
        raise ValueError(f"{folder}: the tokenizer has no eos_token, at which llama.cpp would stop")
    bare = tokenizer("a", add_special_tokens=False).input_ids
    around = tokenizer("a").input_ids
    places = (i for i in range(len(around)) if around[i : i + len(bare)] == bare)
    start = next(places, len(around))
    before, after = around[:start], around[start + len(bare) :]
    for put, name in ((before, "bos"), (after, "eos")):
        if put and put != [special.get(name)]:
            text = tokenizer.convert_ids_to_tokens(put)
            raise ValueError(
                f"{folder}: the tokenizer puts {text} around a text; llama.cpp can put the "
                f"{name}_token there, or nothing"
            )
    vocabulary.add_bos, vocabulary.add_eos = bool(before), bool(after)
    # Without one llama.cpp calls an id of its own choice so; it is never put before a text here.
    special.setdefault("bos", special["eos"])
    ends = [end for end in _ends(folder) if end != special["eos"]]
    special |= dict(zip(("eot", "eom"), ends, strict=False))
    if len(ends) > 2:
        vocabulary.notes.append(
            f"llama.cpp has places for the first two of {ends}, at which generation ends besides "
            "the eos_token"
        )


def _ends(folder: Path) -> list[int]:
    """Ids at which generation ends, as generation_config.json has them."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        ends = json.loads(path.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if isinstance(ends, int):
        return [ends]
    return [int(end) for end in ends] if isinstance(ends, list) else []


def _chat_template(tokenizer: Any) -> str | list[dict[str, str]] | None:
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]
