"""Prefill and decode speed of a model beside its 16-bit original, in one process, interleaved.

Both generate through transformers' own `generate`, as users run them: its loop is part of a
token's time, on both sides alike.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

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

    Returns prefill_tokens_per_s, decode_tokens_per_s, resident_bytes (see `resident_bytes`), the
    same with baseline_, speedup (ratio of the decode medians), kernel (what the quantized layers
    ran), prompt_tokens, decode_tokens, repeats. Raises ValueError when the text is longer than
    the model's positions.
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
        generation_seconds(one, prompt, 2)
    for _ in range(repeats):
        for prefix, one in models.items():
            prefill, decode = generation_seconds(one, prompt, decode_tokens)
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
        **{f"{prefix}resident_bytes": resident_bytes(one) for prefix, one in models.items()},
        "kernel": kernel_names(model),
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "repeats": repeats,
    }


def generation_seconds(
    model: PreTrainedModel, prompt: Tensor, decode_tokens: int
) -> tuple[float, float]:
    """Seconds from the prompt `[1, tokens]` to its first token, and for `decode_tokens` more.

    Greedy, in the 16 bits or codes that the model has; it does not stop at an end-of-text token.
    """
    clock = _Clock(prompt.device)
    start = clock.now()
    model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1 + decode_tokens,
        eos_token_id=None,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    first, last = clock.times[0], clock.times[-1]
    assert len(clock.times) == 1 + decode_tokens
    return first - start, last - first


class _Clock(StoppingCriteria):
    """Stops nothing; notes when each token was there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all weights as the chosen kernels hold them, shared ones once.

    Unlike `true_bytes` it counts what a kernel's layout adds or repeats; the cache of keys and
    values and the activations are not in it.
    """
    spans: set[tuple[str, int, int]] = set()
    for tensor in _tensors(model, set()):
        if tensor.device.type != "meta":  # by address: a storage may be a whole mapped file
            size = tensor.numel() * tensor.element_size()
            spans.add((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + size))
    total, device, end = 0, "", 0
    for place, first, last in sorted(spans):
        if place != device:
            device, end = place, 0
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def _tensors(value: Any, seen: set[int]) -> list[Tensor]:
    """The tensors in a module's attributes, and in the kernel objects and lists among them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, list | tuple):
        items = list(value)
    elif isinstance(value, nn.Module) or type(value).__module__.partition(".")[0] == "quant":
        if id(value) in seen:
            return []
        seen.add(id(value))
        items = list(getattr(value, "__dict__", {}).values())
    else:
        return []
    return [tensor for item in items for tensor in _tensors(item, seen)]
