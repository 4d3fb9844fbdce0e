"""Decode and prefill speeds of quantized models beside their 16-bit original, through `generate`.

All models are in one process and take turns; every figure is a median over the turns. Both sides
get the same treatments, and each is compared at its own best one:
    eager     a cache that grows, no compilation: `model.generate(ids)`
    static    a static cache, no compilation
    compiled  a static cache, the decoding step compiled by torch.compile (inductor)
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList

from quant.kernels import kernel_names
from tests.bench.quant_world import BASE, DECODE_PROMPT, PROMPTS, load

TREATMENTS = ("eager", "static", "compiled")


class _Clock(StoppingCriteria):
    """Stops nothing; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def timed(model: Any, prompt: Tensor, tokens: int, treatment: str) -> tuple[float, float]:
    """(seconds to the first token, median seconds of each further one or nan)."""
    clock = _Clock()
    options: dict[str, Any] = {}
    if treatment != "eager":
        options["cache_implementation"] = "static"
    if treatment == "compiled":
        options["compile_config"] = CompileConfig(mode="default", fullgraph=False)
        options["compile_config"]._compile_all_devices = True  # else on GPUs only
    else:
        options["disable_compile"] = True
    began = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    steps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return clock.times[0] - began, statistics.median(steps) if steps else float("nan")


def measure(
    folder: Path, names: list[str], rounds: int, tokens: int, threads: int, compiled: bool
) -> dict[str, Any]:
    """Tokens per second by treatment and model, kernels by model."""
    torch.set_num_threads(threads)
    models = {name: load(name, folder) for name in names}
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 31_000, (1, max(PROMPTS)), generator=made)
    treatments = [one for one in TREATMENTS if compiled or one != "compiled"]
    found: dict[str, dict[str, list[float]]] = {}

    def note(what: str, name: str, value: float) -> None:
        found.setdefault(what, {}).setdefault(name, []).append(value)

    for treatment in treatments:  # compiling and first touches are no part of the speed
        for model in models.values():
            timed(model, ids[:, :DECODE_PROMPT], tokens, treatment)
    for _ in range(rounds):
        for treatment in treatments:
            for name, model in models.items():
                step = timed(model, ids[:, :DECODE_PROMPT], tokens, treatment)[1]
                note(f"decode_{treatment}", name, 1 / step)
        for length in PROMPTS:
            for name, model in models.items():
                seconds = timed(model, ids[:, :length], 1, "eager")[0]
                note(f"prefill_{length}", name, length / seconds)
    return {
        "tokens_per_s": {
            what: {name: statistics.median(values) for name, values in by_name.items()}
            for what, by_name in found.items()
        },
        "kernels": {name: kernel_names(model) for name, model in models.items() if name != BASE},
        "rounds": rounds,
        "decode_tokens": tokens,
        "threads": threads,
    }


def ratios(rates: dict[str, dict[str, float]]) -> dict[str, Any]:
    """By quantized model: decode over the base's, each side at its best treatment; prefill."""
    best = {
        name: max(by_name[name] for what, by_name in rates.items() if what.startswith("decode_"))
        for name in next(iter(rates.values()))
    }
    return {
        name: {
            "decode": best[name] / best[BASE],
            "prefill": {
                str(length): rates[f"prefill_{length}"][name] / rates[f"prefill_{length}"][BASE]
                for length in PROMPTS
            },
        }
        for name in best
        if name != BASE
    }
