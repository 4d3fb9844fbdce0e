"""GGUF exports of the demo's student, run by llama.cpp itself (llama-cpp-python, `bench` extra).

    make demo && python -m tests.bench.quant_gguf [STUDENT]    (seconds; STUDENT: runs/demo/student)

Both sides are fed the same token ids. KL(ours || llama.cpp) in nats per position: ours is the same
model in float32, quantized ones dequantized; llama.cpp rounds activations to 8 bits where weights
are quantized, which is most of the difference. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quant.evaluation.kl import full_kl
from quant.export.gguf.export import export_gguf
from quant.layers.linear import QuantWeight
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from tests.fixtures import gguf_models

KINDS: dict[str, tuple[QuantSpec | None, str]] = {
    "f32": (None, "f32"),
    "f16": (None, "f16"),
    "q8_0": (None, "q8_0"),
    "q4_1": (QuantSpec(4, 64), "auto"),
    "q5_1": (QuantSpec(5, 64), "auto"),
    "q4_1 embeddings and head": (QuantSpec(4, 64, embeddings=True, head=True), "auto"),
    "q8_0 of 8-bit codes": (QuantSpec(8, 64), "auto"),
    "q8_0 of int8-dynamic": (QuantSpec(8, "channel", "int8-dynamic"), "auto"),
}
SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
CHAT = (  # with the marks that transformers knows and others pass over
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}\n{% endfor %}"
    "{% if add_generation_prompt %}The {% endif %}"
)
PROMPT = "The import statement searches for"


def measure(student: str | Path, positions: int = 2000, prompts: int = 16) -> dict[str, Any]:
    """By kind of export: bytes, bits per weight, KL (mean and largest), share of equal first
    choices, positions; for "f32" also whether greedy tokens are equal. Then how many of 100 texts
    are tokenized equally, by tokenizer, and logits of random models of each architecture.
    """
    student = Path(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    length = AutoModelForCausalLM.from_pretrained(student).config.max_position_embeddings
    sequences = _sequences(tokenizer, min(length, 256), positions)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (spec, kind) in KINDS.items():
            file = Path(folder) / "student.gguf"
            model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
            if spec is not None:
                model = quantize(model, spec)
            report = export_gguf(model, student, file, kind)  # type: ignore[arg-type]
            ours = _dense(student, model)
            # The cache in float32 too: its rounding is no part of what the file holds.
            with llama(file, sequences.shape[1], exact_cache=kind == "f32") as theirs:
                found[name] = {
                    "format": report.format,
                    "bytes": report.bytes,
                    "error": max(report.error.values(), default=0.0),
                    **_compared(ours, theirs, sequences),
                }
                if name == "f32":
                    found[name] |= _greedy(
                        ours, theirs, sequences[:, :64].reshape(-1, 16)[:prompts]
                    )
                    found["completion"] = _completion(ours, theirs, tokenizer)
                    found["tokenization_equal"] = _tokenized(tokenizer, theirs) == 100
        found["chat"] = _chat(student, Path(folder) / "chat")
        found["tokenized_equally"] = tokenizers(Path(folder))
        found["architectures"] = architectures(Path(folder))
    return found


def tokenizers(folder: Path) -> dict[str, int]:
    """Of 100 texts, how many each kind of tokenizer splits as llama.cpp does."""
    made = {kind: gguf_models.byte_level(folder / kind, kind) for kind in gguf_models.BYTE_LEVEL}
    made["sentencepiece"] = gguf_models.sentence_pieces(folder / "sentencepiece")
    found = {}
    for kind, place in made.items():
        tokenizer = AutoTokenizer.from_pretrained(place)
        config = LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer)})
        export_gguf(LlamaForCausalLM(config), place, place / "model.gguf")
        with llama(place / "model.gguf", 64) as theirs:
            found[kind] = _tokenized(tokenizer, theirs)
    return found


def architectures(folder: Path) -> dict[str, float]:
    """Norm of the difference of logits over their norm, for random models in float32."""
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    short = {"original_max_position_embeddings": 64}
    cases: dict[str, LlamaConfig | Qwen3Config] = {
        "llama": LlamaConfig(**SIZES),
        "llama, tied, biases": LlamaConfig(
            **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
        ),
        "llama, llama3 rope": LlamaConfig(**SIZES, rope_parameters=scaled | short),
        "llama, linear rope": LlamaConfig(**SIZES, rope_parameters=linear),
        "llama, yarn rope": LlamaConfig(**SIZES, rope_parameters=yarn | short),
        "qwen3": Qwen3Config(**SIZES, head_dim=32),
        "qwen3, tied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
        "qwen3, yarn rope": Qwen3Config(**SIZES, head_dim=16, rope_parameters=yarn | short),
    }
    place = gguf_models.byte_level(folder / "architectures")
    ids = torch.randint(400, (300,), generator=torch.Generator().manual_seed(1))
    found = {}
    for name, config in cases.items():
        torch.manual_seed(3)
        model = (Qwen3ForCausalLM if "qwen3" in name else LlamaForCausalLM)(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that a wrong place would be seen of
                parameter.data += 0.2 * torch.randn_like(parameter)
        export_gguf(model, place, place / "model.gguf", "f32")
        with llama(place / "model.gguf", 300, exact_cache=True) as theirs:
            ours = model(ids[None]).logits[0].detach()
            found[name] = float((_logits(theirs, ids) - ours).norm() / ours.norm())
    return found


@contextmanager
def llama(file: Path, length: int, exact_cache: bool = False) -> Iterator[Any]:
    """llama.cpp on one thread with the logits of every position."""
    from llama_cpp import GGML_TYPE_F16, GGML_TYPE_F32, Llama

    kind = GGML_TYPE_F32 if exact_cache else GGML_TYPE_F16
    settings = {"n_ctx": length, "n_threads": 1, "type_k": kind, "type_v": kind}
    model = Llama(model_path=str(file), logits_all=True, verbose=False, **settings)
    try:
        yield model
    finally:
        model.close()


def _sequences(tokenizer: Any, length: int, positions: int) -> Tensor:
    """int64 `[n, length]` of at least that many positions, from all over the text."""
    ids = tokenizer("\n".join(topics.values()), verbose=False).input_ids
    count = -(-positions // length)
    apart = len(ids) // count
    return torch.tensor([ids[i * apart : i * apart + length] for i in range(count)])


@torch.no_grad()
def _dense(student: Path, model: PreTrainedModel) -> PreTrainedModel:
    """A plain model in float32 with the very weights that the codes of `model` stand for."""
    plain = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        held = plain.get_submodule(name)
        if isinstance(module, QuantWeight):
            held.weight.copy_(module.dequantize(torch.float32))
        for last, parameter in module.named_parameters(recurse=False):
            getattr(held, last).copy_(parameter)
    return plain


def _logits(theirs: Any, ids: Tensor) -> Tensor:
    """float32 `[tokens, vocab]`."""
    theirs.reset()
    theirs.eval(ids.tolist())
    return torch.from_numpy(np.array(theirs.scores[: len(ids)]))


@torch.no_grad()
def _compared(ours: PreTrainedModel, theirs: Any, sequences: Tensor) -> dict[str, Any]:
    divergences, agreed = [], []
    for ids in sequences:
        reference = ours(ids[None]).logits[0].double().log_softmax(-1)
        answer = _logits(theirs, ids).double().log_softmax(-1)
        divergences.append(full_kl(reference, answer))
        agreed.append((reference.argmax(-1) == answer.argmax(-1)).double())
    kl = torch.cat(divergences)
    return {
        "kl": float(kl.mean()),
        "kl_largest": float(kl.max()),
        "top1": float(torch.cat(agreed).mean()),
        "positions": len(kl),
    }


@torch.no_grad()
def _greedy(ours: PreTrainedModel, theirs: Any, prompts: Tensor, new: int = 48) -> dict[str, Any]:
    """Whether both continue every prompt with the same ids."""
    equal = 0
    for prompt in prompts:
        made = ours.generate(prompt[None], max_new_tokens=new, min_new_tokens=new, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        answer: list[int] = []
        theirs.reset()
        theirs.eval(prompt.tolist())
        while len(answer) < new:
            scores = theirs.scores[theirs.n_tokens - 1].copy()
            scores[theirs.token_eos()] = -np.inf  # as min_new_tokens has it
            answer.append(int(scores.argmax()))
            theirs.eval(answer[-1:])
        equal += answer == made
    return {"greedy_equal": equal == len(prompts), "greedy_prompts": len(prompts)}


@torch.no_grad()
def _completion(ours: PreTrainedModel, theirs: Any, tokenizer: Any, new: int = 24) -> Any:
    """The text that each makes of a prompt given as text."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = ours.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :]
    answer = theirs.create_completion(PROMPT, max_tokens=new, temperature=0.0)
    text = answer["choices"][0]["text"]
    expected = tokenizer.decode(made, skip_special_tokens=True)
    return {"prompt": PROMPT, "text": text, "equal": text == expected}


@torch.no_grad()
def _chat(student: Path, place: Path, new: int = 24) -> Any:
    """The answer that each gives to a message, through a chat template of the file."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(place)
    export_gguf(model, place, place / "chat.gguf", "f32")
    messages = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    made = model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :]
    with llama(place / "chat.gguf", 256, exact_cache=True) as theirs:
        answer = theirs.create_chat_completion(messages, max_tokens=new, temperature=0.0)
    text = answer["choices"][0]["message"]["content"]
    return {"text": text, "equal": text == tokenizer.decode(made, skip_special_tokens=True)}


def _tokenized(tokenizer: Any, theirs: Any) -> int:
    """Of 100 texts, how many both split into the same ids, special tokens included."""
    return sum(
        tokenizer(text).input_ids == theirs.tokenize(text.encode(), add_bos=True, special=True)
        for text in gguf_models.texts(100)
    )


def main() -> None:
    student = sys.argv[1] if len(sys.argv) > 1 else "runs/demo/student"
    torch.set_num_threads(1)
    print(json.dumps(measure(student)))


if __name__ == "__main__":
    main()
