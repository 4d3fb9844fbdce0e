"""Prefill and decode speed of a model beside its 16-bit original, in one process, interleaved."""

from __future__ import annotations

import inspect
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant.kernels import kernel_names


def measure_speed(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int = 3,
) -> dict[str, Any]:
    """Tokens per second of greedy generation for one sequence, each number a median of repeats.

    The two models take turns (A B A B), so that a drift of the machine meets both alike; both
    must lie on the same device. Call it while nothing else runs there.

    Returns prefill_tokens_per_s, decode_tokens_per_s, the same with baseline_, speedup (ratio
    of the decode medians), kernel, prompt_tokens, decode_tokens, repeats. Raises ValueError when
    the text is longer than the model's positions.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + decode_tokens > limit:
        raise ValueError(
            f"speed_prompt_tokens + speed_decode_tokens = {prompt_tokens + decode_tokens} "
            f"exceeds the model's {limit} positions; ask for fewer"
        )
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocab, (1, prompt_tokens), generator=generator).to(model.device)
    models = {"": model.eval(), "baseline_": baseline.eval()}
    times: dict[str, list[float]] = {
        prefix + phase: [] for prefix in models for phase in ("prefill", "decode")
    }
    for one in models.values():  # allocations and lazy set-up are no part of the speed
        _timed(one, prompt, 2)
    for _ in range(repeats):
        for prefix, one in models.items():
            prefill, decode = _timed(one, prompt, decode_tokens)
            times[prefix + "prefill"].append(prefill)
            times[prefix + "decode"].append(decode)
    rates = {
        f"{name}_tokens_per_s": (prompt_tokens if "prefill" in name else decode_tokens)
        / statistics.median(seconds)
        for name, seconds in times.items()
    }
    return {
        **rates,
        "speedup": rates["decode_tokens_per_s"] / rates["baseline_decode_tokens_per_s"],
        "kernel": kernel_names(model),
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "repeats": repeats,
    }


@torch.inference_mode()
def _timed(model: PreTrainedModel, prompt: Tensor, decode_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt `[1, tokens]`, and for `decode_tokens` further single tokens."""
    # As in generation, the head runs for the last position of the prompt only.
    accepts = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
    start = _now(prompt.device)
    output = model(input_ids=prompt, use_cache=True, **last_only)
    token = output.logits[:, -1:].argmax(-1)
    middle = _now(prompt.device)
    for _ in range(decode_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return middle - start, _now(prompt.device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
