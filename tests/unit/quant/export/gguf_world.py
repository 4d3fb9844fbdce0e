"""Tokenizers of every kind that a GGUF file can hold, trained in a moment, and texts to try them.

The texts are what tokenizers differ in: runs of whitespace, digits, contractions, scripts, emoji,
control characters, special tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from quant.export.gguf_bpe import LLAMA3, QWEN2

END, PAD = "<|endoftext|>", "<|pad|>"
SCRIPTS = ["héllo wörld ça va? 你好，世界 こんにちは 안녕 привет мир 🎉🚀 مرحبا नमस्ते"] * 30
BYTE_LEVEL = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2")
TRICKY = [
    *("", " ", "  ", "\n", "\n\n", "\t\t x", " leading", "trailing  ", "a", "  two  spaces  "),
    *("don't I'll WE'RE they'Ve", "'s 't '", "it's 12345 67 3.14 1,000,000 ½ ²", "１２３４ ٣٤٥"),
    "x=[i**2 for i in range(10)]\n\tif x:\n        return {'a': 1}\n",
    *("héllo wörld ça va?", "你好，世界！今天天气很好", "こんにちは、世界", "안녕하세요 세계"),
    *("привет, мир! как дела?", "مرحبا بالعالم", "שלום עולם", "ไทยภาษา", "नमस्ते दुनिया"),
    *("🎉🚀👩‍👩‍👧‍👦🇩🇪👍🏽", "😀 😀  😀", "a\u00a0b\u2003c\u3000d", "zero\u200bwidth", "\ufeffbom"),
    *(END, f"a{END}b", f"{END}\n{PAD} x", "\r\n\r\n a\r b", "   \n   \n  x", "!!!???...---"),
    *("http://example.com/a?b=c&d=e#f", "CamelCaseAndsnake_case", "tab\tsep\tvals", "``code``"),
    *("\u01c5\u2160\u00b2\u2460", "a\x00b\x07", "\U0001d54f\U0001d7d8", "ﬁ ﬂ Ａｂｃ ½⅓"),
    *("\u00ad soft", "x\u2028y\u2029z", "\x85next", "a\x0bb\x0cc"),
]


def texts(count: int = 100) -> list[str]:
    """Tricky ones, then stretches of prose, code and tables of growing length."""
    prose = "\n".join(topics.values())
    rest = range(count - len(TRICKY))
    return [*TRICKY, *(prose[3001 * i : 3001 * i + 37 + 11 * i] for i in rest)][:count]


def byte_level(folder: Path, kind: str = "gpt-2", size: int = 400) -> Path:
    """A byte-level BPE that splits as llama.cpp's `kind` does, saved."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    bare = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    regex = {"llama-bpe": LLAMA3, "dbrx": LLAMA3, "qwen2": QWEN2}.get(kind)
    if regex is not None:
        tokenizer.pre_tokenizer = pre.Sequence([pre.Split(Regex(regex), "isolated"), bare])
    elif kind == "smollm":
        words = pre.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), words])
    else:
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return save(tokenizer, folder, eos_token=END, pad_token=PAD)


def sentence_pieces(folder: Path, scheme: str | None = None, size: int = 800) -> Path:
    """A BPE with byte fallback whose merges are all pairs that make a piece, saved.

    scheme: Metaspace's, as newer files of Llama 2 have it; None: older files' normalizers.
    """
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    prefix = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    trained.normalizer = normalizers.Sequence(prefix)
    trained.pre_tokenizer = pre.Split("▁", "merged_with_next")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special + fallback, show_progress=False
    )
    trained.train_from_iterator(list(topics.values())[:12], trainer)
    spec = json.loads(trained.to_str())
    vocabulary = spec["model"]["vocab"]
    merges: list[list[str]] = []
    for piece in dict.fromkeys(left + right for left, right in spec["model"]["merges"]):
        pairs = [[piece[:cut], piece[cut:]] for cut in range(1, len(piece))]
        merges += [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    spec["model"]["merges"] = merges
    spec["pre_tokenizer"] = None
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if scheme is not None:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return save(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save(tokenizer: Tokenizer, folder: Path, **special: str) -> Path:
    """As a folder that AutoTokenizer reads."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
    fast.save_pretrained(folder)
    return folder


def _corpus() -> list[str]:
    return [*list(topics.values())[:12], *SCRIPTS]
