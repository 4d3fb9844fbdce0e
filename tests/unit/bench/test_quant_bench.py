"""The bench of quantized models tells what was reached and what was not, as far as it measured."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench.figures import results_by_kind, tables_by_kind
from tests.bench.quant import aims
from tests.bench.quant_docs import NAMES, PAGE, parts
from tests.bench.quant_speed import ratios

GOOD: dict[str, Any] = {
    "folder_ratio": 0.28,
    "folder_ratio_8bit": 0.53,
    "decode_speedup": 2.5,
    "decode_memory_ratio": 0.4,
    "quantize_s": 90,
    "prefill_ratio": {"512": 0.5, "2048": 0.8},
    "gguf": {
        "f32": {"kl": 1e-12, "top1": 1.0, "greedy_equal": True},
        "q4_1": {"kl": 0.01, "top1": 0.97},
        "tokenization_equal": True,
        "tokenized_equally": {"gpt-2": 100, "qwen2": 100},
    },
}


def test_bounds_themselves_are_reached() -> None:
    assert all(aims(GOOD).values()) and len(aims(GOOD)) == 11


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("folder_ratio", 0.301),
        ("folder_ratio_8bit", 0.56),
        ("decode_speedup", 2.49),
        ("decode_memory_ratio", 0.41),
        ("quantize_s", 91),
        ("prefill_ratio", {"512": 0.49, "2048": 0.8}),
        ("prefill_ratio", {"512": 0.5, "2048": 0.79}),
        ("gguf", {**GOOD["gguf"], "q4_1": {"kl": 0.011, "top1": 0.97}}),
        ("gguf", {**GOOD["gguf"], "q4_1": {"kl": 0.01, "top1": 0.96}}),
        ("gguf", {**GOOD["gguf"], "f32": {**GOOD["gguf"]["f32"], "greedy_equal": False}}),
        ("gguf", {**GOOD["gguf"], "tokenization_equal": False}),
        ("gguf", {**GOOD["gguf"], "tokenized_equally": {"gpt-2": 99, "qwen2": 100}}),
    ],
)
def test_a_missed_aim_is_told(key: str, value: Any) -> None:
    assert list(aims({**GOOD, key: value}).values()).count(False) == 1


def test_the_published_figures_give_the_published_aims_and_tables() -> None:
    for found in results_by_kind("quant").values():
        assert aims(found) == found["aims"] and len(found["aims"]) == 11
    page, tables = PAGE.read_text(), tables_by_kind("quant", parts)
    assert len(tables) == 4 and all(text in page for text in tables.values())


def test_a_part_alone_is_judged_alone() -> None:
    assert aims({"decode_speedup": 3.0}) == {"decode_speedup at least 2.5": True}


def test_each_side_is_taken_at_its_best_treatment() -> None:
    rates = {
        "decode_eager": {"bf16": 10.0, "4-bit": 30.0},
        "decode_compiled": {"bf16": 12.0, "4-bit": 24.0},
        "prefill_512": {"bf16": 100.0, "4-bit": 80.0},
        "prefill_2048": {"bf16": 100.0, "4-bit": 90.0},
    }
    assert ratios(rates) == {"4-bit": {"decode": 2.5, "prefill": {"512": 0.8, "2048": 0.9}}}


def test_every_model_has_a_row() -> None:
    rates = {"decode_eager": dict.fromkeys(NAMES, 2.0), "prefill_512": dict.fromkeys(NAMES, 3.0)}
    quantized = [name for name in NAMES if name != "bf16"]
    told = {"decode": 1.5, "prefill": {"512": 0.9, "2048": 0.95}}
    found = {
        "tokens_per_s": rates,
        "over_bf16": dict.fromkeys(quantized, told),
        "memory": dict.fromkeys(NAMES, {"decoding": 10**9}),
        "folder_ratios": dict.fromkeys(quantized, 0.3),
        "quantize_s_by_cell": dict.fromkeys(quantized, 11.0),
    }
    made = parts(found)
    assert set(made) == {"quant-models", "quant-treatments"}
    assert all(words in made["quant-models"] for words in NAMES.values())
