"""A tokenizer as llama.cpp takes it: tokens, their types, and what joins them.

llama.cpp has its own tokenizers (src/llama-vocab.cpp, github.com/ggml-org/llama.cpp), which a file
chooses by name. So what the tokenizer at hand really does is compared with what those do, and
anything else is refused: a wrong split would be a model that silently answers worse.

llama.cpp has two kinds of BPE, recognized here in what a tokenizer.json does: "gpt2" is byte-level
BPE by ranked merges behind a pre-tokenizer known by name; "llama" is SentencePiece's BPE, which has
no merges: it joins any two neighbours whose union is a piece, the best score first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "\u2581"
DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = _WORDS + r"\p{N}" + _REST
# What splits a text, and whether a whole word that is a token is taken without merging, by the
# name llama.cpp has for it. "dbrx" is Llama 3's split without the latter.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
}


@dataclass
class TokenPieces:
    """A recognized BPE: what `Vocabulary` needs to know of it besides the tokens."""

    model: str
    pre: str
    merges: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    unknown: str | None = None
    space_prefix: bool | None = None
    notes: list[str] = field(default_factory=list)

    def type_of(self, text: str) -> TokenType:
        """The type of a token that is not an added one."""
        if self.model == "llama":
            return TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
        # Text becomes bytes first, so a token of other characters never comes from a text.
        return TokenType.NORMAL if set(text) <= _ALPHABET else TokenType.UNUSED

    def score_of(self, text: str) -> float:
        """Higher is joined earlier; what no merge makes comes last."""
        return self.scores.get(text, -float(len(self.scores) + 1))


_BYTE = re.compile("<0x[0-9A-F]{2}>")
_ALPHABET = set(ByteLevel.alphabet())


def byte_level(spec: dict[str, Any]) -> TokenPieces:
    """Byte-level BPE. spec: a parsed tokenizer.json. Raises ValueError for what llama.cpp lacks."""
    model = _bpe(spec)
    notes = []
    for step in _steps(spec["normalizer"], "normalizers"):
        if step["type"] != "NFC":
            raise ValueError(f"normalizer {step['type']}: llama.cpp has none; may be NFC or null")
        notes.append(
            "llama.cpp does not normalize text to NFC: one that is not in NFC already is tokenized "
            "differently"
        )
    splits, encoded = [], False
    for step in _steps(spec["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel":
            encoded = True
            if step.get("add_prefix_space"):
                raise ValueError("ByteLevel.add_prefix_space is true; llama.cpp adds no space")
            if step.get("use_regex", True):
                splits.append(GPT2)
        else:
            splits.append(_split(step))
    if not encoded:
        raise ValueError(
            "the pre-tokenizer is not byte-level; may be ByteLevel, with or without Split"
        )
    pre = PRE_TOKENIZERS.get((tuple(splits), bool(model.get("ignore_merges"))))
    if pre is None:
        names = ", ".join(dict.fromkeys(PRE_TOKENIZERS.values()))
        raise ValueError(
            f"the pre-tokenizer splits by {' then '.join(splits) or 'nothing'} "
            f"(ignore_merges: {bool(model.get('ignore_merges'))}); may be as llama.cpp's {names}"
        )
    merges = [f"{left} {right}" for left, right in _merges(model)]
    return TokenPieces("gpt2", pre, merges, notes=notes)


def sentence_pieces(spec: dict[str, Any]) -> TokenPieces:
    """SentencePiece's BPE with byte fallback, as Llama 2 and TinyLlama have it, when its merges
    are those that SentencePiece would find. spec: a parsed tokenizer.json. Raises ValueError."""
    model = _bpe(spec)
    vocabulary = model["vocab"]
    missing = [
        text for text in (f"<0x{byte:02X}>" for byte in range(256)) if text not in vocabulary
    ]
    if missing:
        raise ValueError(f"byte_fallback is true, but there is no token {missing[0]}")
    if model.get("ignore_merges"):
        raise ValueError("ignore_merges is true, which llama.cpp has for byte-level BPE alone")
    prefix, notes = _space_prefix(spec)
    scores = _scores(vocabulary, _merges(model), {t["content"] for t in spec["added_tokens"]})
    return TokenPieces("llama", "default", [], scores, model.get("unk_token"), prefix, notes)


def _bpe(spec: dict[str, Any]) -> dict[str, Any]:
    model = spec["model"]
    if model["type"] != "BPE":
        raise ValueError(f"the tokenizer's model is {model['type']}; may be BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{key} is {model[key]!r}; llama.cpp has none")
    return model


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs, also from the older files that hold them as "left right"."""
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return [(left, right) for left, right in pairs]


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [s for part in step[key] for s in _steps(part, key)] if key in step else [step]


def _split(step: dict[str, Any]) -> str:
    """The regex of a pre-tokenizer that splits a text and keeps all of it."""
    if step["type"] == "Digits" and step.get("individual_digits"):
        return DIGIT
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
        pattern = step["pattern"]
        return pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
    raise ValueError(
        f"the pre-tokenizer {step['type']} is none of llama.cpp's; may be ByteLevel, "
        "Digits (each by itself) or Split (Isolated)"
    )


def _space_prefix(spec: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a text gets a space in front; notes where llama.cpp's rule differs in a corner."""
    normal = _steps(spec["normalizer"], "normalizers")
    before = _steps(spec["pre_tokenizer"], "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not before and normal and normal[-1] == replace:
        if normal[:-1] == [{"type": "Prepend", "prepend": SPACE}]:
            return True, []
        if not normal[:-1]:
            return False, []
    if not normal and [step["type"] for step in before] == ["Metaspace"]:
        space = before[0]
        if space["replacement"] == SPACE and not space["split"]:
            scheme = space["prepend_scheme"]
            corner = {
                "never": [],
                "always": ["llama.cpp puts a space also before a text that begins with one"],
                "first": [
                    "llama.cpp puts a space also before a text that begins with one, and before "
                    "text behind a special token"
                ],
            }
            return scheme != "never", corner[scheme]
    raise ValueError(
        "byte_fallback with this normalizer and pre-tokenizer is not SentencePiece's; may be "
        f"Prepend({SPACE}) and Replace(' ', {SPACE}) as normalizers, or Metaspace without split"
    )


def _scores(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], added: Iterable[str]
) -> dict[str, float]:
    """A score for every piece that merges make, from their order.

    Raises ValueError when joining by these scores is not what the merges do: SentencePiece joins
    every pair of pieces whose union is a piece, with the rank of the union.
    """
    made = [left + right for left, right in merges]
    # Runs of one character (indentation) have one score in Llama 2; joined in whatever order, what
    # becomes of a run is the same.
    several = [piece for piece in made if len(set(piece)) > 1]
    closed: set[str] = set()
    for piece, _ in groupby(several):
        if piece in closed:
            raise ValueError(
                f"the merges into {piece!r} are not next to each other, so they have no one score "
                "and this is not SentencePiece's BPE; llama.cpp has byte-level BPE besides"
            )
        closed.add(piece)
    listed = set(merges)
    pieces = {t for t in vocabulary if not _BYTE.fullmatch(t)} - set(added)
    for piece in pieces:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            both = all(len(part) == 1 or part in pieces for part in pair)
            if both and pair not in listed:
                raise ValueError(
                    f"piece {piece!r} is also {pair[0]!r} + {pair[1]!r}, which the merges do not "
                    "have, so this is not SentencePiece's BPE and llama.cpp would join it"
                )
    return {piece: -float(order) for order, piece in enumerate(dict.fromkeys(made))}


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


def _load(folder: Path) -> Any:  # noqa: ANN401
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


def _unused(number: int, backend: Any) -> str:  # noqa: ANN401
    """A name for a row without a token, one that no token has: llama.cpp needs them different."""
    text = f"[PAD{number}]"
    while backend.token_to_id(text) is not None:
        text = f"[{text}]"
    return text


def _add_special(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
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


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]] | None:
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]
