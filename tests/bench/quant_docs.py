"""The tables of docs/quantization.md that `tests.bench.quant` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.bench.docs import figure, fill, table
from tests.bench.figures import tables_by_kind

PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"
NAMES = {
    "bf16": "bf16",
    "8-bit": "hqq, 8 bits, groups of 64",
    "4-bit": "hqq, 4 bits, groups of 64",
    "2-bit": "hqq, 2 bits, groups of 64",
    "int8-dynamic": "int8-dynamic",
}
Json = dict[str, Any]


def models(found: Json) -> str:
    """One row per model: size, memory, speeds over bf16's."""
    over, rates = found["over_bf16"], found["tokens_per_s"]
    base = found["memory"]["bf16"]["decoding"]
    rows = []
    for name, words in NAMES.items():
        best = max(by[name] for what, by in rates.items() if what.startswith("decode_"))
        told = over.get(name)
        rows.append(
            [
                words,
                figure(found["folder_ratios"].get(name, 1.0), 3),
                figure(found["memory"][name]["decoding"] / base, 2),
                figure(best, 1),
                figure(told["decode"] if told else 1.0, 2),
                figure(told["prefill"]["512"] if told else 1.0, 2),
                figure(told["prefill"]["2048"] if told else 1.0, 2),
                figure(found["quantize_s_by_cell"].get(name), 0),
            ]
        )
    heads = ["model", "folder", "memory", "decode tokens/s", "decode", "prefill 512"]
    return table([*heads, "prefill 2,048", "seconds to quantize"], rows)


def treatments(found: Json) -> str:
    """Decode tokens per second by treatment."""
    rates = {
        what.removeprefix("decode_"): by
        for what, by in found["tokens_per_s"].items()
        if what.startswith("decode_")
    }
    rows = [
        [words, *(figure(by[name], 1) for by in rates.values())] for name, words in NAMES.items()
    ]
    return table(["decode tokens/s", *rates], rows)


def exports(found: Json) -> str:
    """What the demo student's exports lose."""
    rows = [
        [
            f"GGUF {kind}",
            figure(one["bytes"] / 1e6, 2),
            _nats(one["kl"]),
            figure(one["top1"], 4),
        ]
        for kind, one in found.get("gguf", {}).items()
        if isinstance(one, dict) and "kl" in one
    ]
    return table(["export", "MB", "mean KL", "top-1 agreement"], rows)


def _end(words: str) -> str:
    """What comes after "layout: " or "kind: "."""
    return words.partition(": ")[2] or words


def _nats(divergence: float) -> str:
    """A KL, which may be a rounding error or half a nat."""
    return f"{divergence:.1e}"


def hugging_face(found: Json) -> str:
    """What exports to Hugging Face folders lose."""
    rows = [
        [
            f"`{cell}` as {_end(one['format'])}; {_end(one['chosen'])}",
            figure(one["bytes"] / 1e6, 2),
            _nats(one["kl"]),
            figure(one["top1"], 4),
            _nats(one["quantized_kl_to_student"]),
            _nats(one["kl_to_student"]),
            _nats(one["with_student_kl_to_student"]),
            _nats(one["exact_kl"]),
        ]
        for cell, one in found["hf"].items()
    ]
    heads = ["export", "MB", "KL to the codes", "top-1", "KL of the cell", "of its export"]
    return table([*heads, "chosen from 16 bits", "KL of `exact` to the codes"], rows)


def parts(found: Json) -> dict[str, str]:
    """The tables whose figures are there, by name."""
    made = {}
    if {"over_bf16", "memory", "folder_ratios"} <= set(found):
        made["quant-models"] = models(found)
    if "tokens_per_s" in found:
        made["quant-treatments"] = treatments(found)
    if "gguf" in found:
        made["quant-gguf"] = exports(found)
    if "hf" in found:
        made["quant-hf"] = hugging_face(found)
    return made


def text(found: Json) -> str:
    """The tables, for a terminal."""
    return "\n\n".join(parts(found).values())


def write() -> None:
    """Puts those of all kinds of processors into the page."""
    fill(PAGE, tables_by_kind("quant", parts))
