"""A tiny world for tests: texts, a corpus, models, and what a plain teacher pass gives."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 32
VOCAB = 320
WORDS = [f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in ("rn", "st", "n", "mp")]


def write_texts(folder: Path, documents: int = 240, seed: int = 0) -> str:
    """Writes short documents of made-up words; returns a glob of them."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    lines = []
    for number in range(documents):
        words = draw.choices(WORDS, k=draw.randint(4, 40))
        lines.append(json.dumps({"text": f"{number} " + " ".join(words)}))
    (folder / f"{seed}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "*.jsonl")


def write_chats(folder: Path, conversations: int = 160, seed: int = 0) -> str:
    """Writes conversations of one to three questions and shorter answers, of made-up words;
    returns a glob of them."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)

    def say(role: str, most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, most)))}

    rows = []
    for _ in range(conversations):
        turns = [say("system", 3)] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            turns += [say("user", 6), say("assistant", 4)]
        rows.append(json.dumps({"messages": turns}))
    (folder / f"{seed}.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder / "*.jsonl")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same texts, with marks; the end of a turn stands behind them, as in many models' templates.
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROLS = ("<|im_start|>", "<|im_end|>")


def chat_tokenizer(
    folder: Path, template: str | None = CHATML, controls: tuple[str, ...] = CONTROLS
) -> Any:
    """A byte-level tokenizer of made-up words with control tokens and a chat template, saved."""
    from trainer.corpus.tokenizer import load_tokenizer, train_tokenizer

    plain = folder.with_name(f"{folder.name}-plain")
    train_tokenizer([" ".join(WORDS), "system user assistant " * 20], VOCAB, plain)
    tokenizer = load_tokenizer(plain)
    tokenizer.add_special_tokens({"additional_special_tokens": list(controls)})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def data_spec(glob: str, **changes: Any) -> Any:
    """The spec's `data` for the texts."""
    from trainer.spec import DataSpec, SourceSpec

    values: dict[str, Any] = {
        "select_sequences": 7,
        "report_sequences": 9,
        "sequence_length": LENGTH,
        "max_tokens": 1 << 30,
    }
    return DataSpec(train=[SourceSpec(source=glob)], **{**values, **changes})


def make_corpus(store: Any, data: Any, tokenizer: Any = None) -> Any:
    """Makes and opens a corpus; the tokenizer is trained on it unless one is given."""
    from trainer.corpus.corpus import open_corpus
    from trainer.corpus.prepare import corpus_identity, prepare
    from trainer.spec import TokenizerSpec

    tokenizer = tokenizer or TokenizerSpec(train=VOCAB)
    prepare(data, tokenizer, store, identity=corpus_identity(data, {}))
    return open_corpus(store)


def config_values(kind: str = "llama", *, tied: bool = True, width: int = 32) -> dict[str, Any]:
    """An inline student config: two layers of a small `kind`."""
    if kind == "gpt2":
        return {
            "model_type": "gpt2",
            "n_embd": width,
            "n_layer": 2,
            "n_head": 4,
            "tie_word_embeddings": tied,
        }  # its default dropout of 0.1 stays
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }


def save_model(folder: Path, tokenizer_folder: Path, seed: int = 5, **config: Any) -> Path:
    """A random model with lively logits, and its tokenizer, as a Hugging Face folder.

    Of any family that transformers knows: teachers may be of more than students.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.corpus.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    values = config_values(**config)
    made = AutoConfig.for_model(
        values.pop("model_type"),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"max_position_embeddings": LENGTH, **values},
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_plain(folder: Path | str) -> Any:
    """The model of a folder as any user loads it, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def documents_of(position_ids: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of the documents in one sequence, from its positions [seq]."""
    starts = [*np.flatnonzero(position_ids == 0).tolist(), len(position_ids)]
    return list(zip(starts[:-1], starts[1:], strict=True))


def plain_logits(model: Any, batch: Any, *, by_document: bool) -> np.ndarray:
    """Float64 logits [batch, seq, vocab] by transformers' own forward.

    by_document: a forward pass for each document alone, so nothing can leak across them; else one
    pass per sequence, with a causal mask across documents.
    """
    import torch

    rows = []
    for ids, positions in zip(batch.input_ids, batch.position_ids, strict=True):
        spans = documents_of(positions) if by_document else [(0, len(ids))]
        with torch.no_grad():
            parts = [model(torch.from_numpy(ids[None, a:b])).logits[0].double() for a, b in spans]
        rows.append(torch.cat(parts).numpy())
    return np.stack(rows)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Float64 log-softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def plain_records(log_p: np.ndarray, k: int, temperatures: list[float]) -> tuple[np.ndarray, ...]:
    """Top-k ids, their log-probabilities and log tails of log-probabilities [..., vocab]."""
    order = np.argsort(-log_p, axis=-1, kind="stable")
    ids, rest = order[..., :k], order[..., k:]
    kept = np.take_along_axis(log_p, ids, axis=-1)
    others = np.take_along_axis(log_p, rest, axis=-1)
    with np.errstate(divide="ignore"):
        tails = [np.log(np.exp(others / t).sum(axis=-1)) for t in temperatures]
    return ids, kept, np.stack(tails, axis=-1)


def plain_cache(cache: Any, teacher: Any, corpus: Any, spec: Any, **how: Any) -> None:
    """A logit cache of the whole corpus as `spec` (a CacheSpec) has it, from plain forward passes;
    numpy draws."""
    from trainer.logits.codebook_fit import fit_codebook
    from trainer.logits.codec import encode
    from trainer.logits.coding import coding_of, train_kinds
    from trainer.logits.store import publish_codebook, write_shard

    draw = np.random.default_rng(11)
    for name in ("train", "select", "report"):
        part = corpus.part(name)
        batch = part.batch(np.arange(len(part)))
        log_p = log_softmax(plain_logits(teacher, batch, **how))
        labels = np.concatenate([batch.input_ids[:, 1:], np.zeros_like(batch.input_ids[:, :1])], 1)
        for kind in train_kinds(spec) if name == "train" else ["eval"]:
            coding = coding_of(spec, log_p.shape[-1], kind)
            items = [
                plain_item(coding, row, true, draw) for row, true in zip(log_p, labels, strict=True)
            ]
            codebook = publish_codebook(cache, kind, fit_codebook(coding, items))
            keys = [key.tobytes() for key in batch.keys]
            write_shard(cache, kind, keys, [encode(item, codebook) for item in items])


def plain_item(coding: Any, log_p: np.ndarray, labels: np.ndarray, draw: Any) -> Any:
    """What a cache with this coding keeps of log-probabilities [positions, vocab]."""
    from trainer.logits.records import Draws, Records

    if coding.method == "sample":
        counts = draw.multinomial(coding.k, np.exp(log_p))
        return Draws(np.stack([np.repeat(np.arange(len(row)), row) for row in counts]).astype("i4"))
    ids, kept, tails = plain_records(log_p, coding.k, list(coding.temperatures))
    more = []
    if coding.method == "exact":
        entropy = -(np.exp(log_p) * log_p).sum(axis=-1)
        true = log_p[np.arange(len(log_p)), labels]
        more = [entropy.astype(np.float32), true.astype(np.float32)]
    return Records(ids.astype(np.int64), kept.astype("f4"), tails.astype("f4"), *more)


def stored_records(cache: Any) -> dict[tuple[str, bytes], list[bytes]]:
    """The stored bytes of all records of a cache by kind and key: a list, if there are several."""
    from trainer.logits.store import SHARDS, cache_fingerprint, list_shards, read_index

    result: dict[tuple[str, bytes], list[bytes]] = {}
    for files in list_shards(cache):
        index = read_index(cache, files, cache_fingerprint(cache))
        if index is None:  # a kill left its records behind: without an index there is no shard
            continue
        data = cache.read_bytes(f"{SHARDS}/{files.name}.bin")
        ends = index.starts() + index.lengths
        for key, first, end in zip(index.keys, index.starts(), ends, strict=True):
            result.setdefault((index.kind, key.tobytes()), []).append(data[first:end])
    return result
