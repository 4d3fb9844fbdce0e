"""The two kinds of BPE that llama.cpp has, recognized in what a tokenizer.json does.

"gpt2" is byte-level BPE by ranked merges behind a pre-tokenizer known by name; "llama" is
SentencePiece's BPE, which has no merges: it joins any two neighbours whose union is a piece, the
best score first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from gguf import TokenType
from tokenizers.pre_tokenizers import ByteLevel

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
class Pieces:
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


def byte_level(spec: dict[str, Any]) -> Pieces:
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
    return Pieces("gpt2", pre, merges, notes=notes)


def sentence_pieces(spec: dict[str, Any]) -> Pieces:
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
    return Pieces("llama", "default", [], scores, model.get("unk_token"), prefix, notes)


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
