"""Speed, memory and energy of a model's prefill and decoding beside its 16-bit original's, in one
process, interleaved.

Both generate through transformers' own `generate`, as users run them: its loop is part of a
token's time, on both sides alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from quant.evaluation.energy import EnergyMeter
from quant.kernels import kernel_names
from trainer.processor import fast_dtype

BASELINE_TOKENS = 16  # decoded, at most, each time the baseline's dtypes are compared
ENERGY_SECONDS = 2.0  # of decoding, at least: counters move every few ten milliseconds
PROC = Path("/proc/self")


def load_baseline(
    folder: str | Path,
    device: torch.device | str,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int = 3,
) -> PreTrainedModel:
    """The 16-bit model in `folder` for `measure_speed`, in the dtype in which it decodes faster.

    On a CPU that is measured, bfloat16 and float32 in turns: which is faster depends on the
    instruction set, the model's size and its kernels. On a GPU, and where memory does not hold the
    model in both, it is `fast_dtype`'s. Its `dtype` says which it was. Call it while nothing else
    runs there.
    """
    device = torch.device(device)
    names = ["bfloat16", "float32"]
    if device.type != "cpu" or not _fits_twice(Path(folder)):
        names = [fast_dtype(str(device))]
    # Here, so that a machine that has torch alone can measure models that it made itself.
    from trainer.models.load import load_for_inference

    models = [load_for_inference(str(folder), device, getattr(torch, name)) for name in names]
    if len(models) == 1:
        return models[0]
    prompt = random_prompt(models[0], prompt_tokens)
    tokens = min(decode_tokens, BASELINE_TOKENS)
    seconds: list[list[float]] = [[] for _ in models]
    for model in models:
        generation_seconds(model, prompt, 2)
    for _ in range(repeats):
        for model, times in zip(models, seconds, strict=True):
            times.append(generation_seconds(model, prompt, tokens)[1])
    medians = [statistics.median(times) for times in seconds]
    return models[medians.index(min(medians))]


def _fits_twice(folder: Path) -> bool:
    """Whether free memory holds a model in bfloat16 and in float32, and as much again."""
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return 6 * stored <= psutil.virtual_memory().available


def measure_speed(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int = 3,
    notify: Callable[[float], None] = lambda done: None,
) -> dict[str, Any]:
    """Tokens per second of greedy generation for one sequence, each number a median of repeats.

    The two models take turns (A B A B), so that a drift of the machine meets both alike; both
    must lie on the same device. Call it while nothing else runs there. tell(done): is called after
    every generation, with the share of them that there were.

    Returns prefill_tokens_per_s, decode_tokens_per_s, resident_bytes (see `resident_bytes`),
    peak_memory_bytes (see `peak_memory`), energy_per_token_j (see `energy_per_token`), the same
    with baseline_, baseline_dtype, speedup (ratio of the decode medians), kernel (what the
    quantized layers ran), memory_note and energy_note (what was measured, or "not measurable: " and
    why), prompt_tokens, decode_tokens, repeats. Raises ValueError when the text is longer than the
    model's positions.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + decode_tokens > limit:
        raise ValueError(
            f"speed_prompt_tokens + speed_decode_tokens = {prompt_tokens + decode_tokens} "
            f"exceeds the model's {limit} positions; ask for fewer"
        )
    prompt = random_prompt(model, prompt_tokens)
    models = {"": model.eval(), "baseline_": baseline.eval()}
    times: dict[str, list[float]] = {
        prefix + phase: [] for prefix in models for phase in ("prefill", "decode")
    }
    memory: dict[str, tuple[int | None, str]] = {}
    energy: dict[str, tuple[float | None, str]] = {}
    told = count(1)

    def in_turns() -> Iterator[tuple[str, PreTrainedModel]]:
        for turn in models.items():
            yield turn
            notify(next(told) / (len(models) * (repeats + 3)))

    for _, one in in_turns():  # allocations and lazy set-up are no part of the speed
        generation_seconds(one, prompt, 2)
    for prefix, one in in_turns():
        memory[prefix] = peak_memory(one, prompt, decode_tokens)
    for _ in range(repeats):
        for prefix, one in in_turns():
            prefill, decode = generation_seconds(one, prompt, decode_tokens)
            times[prefix + "prefill"].append(prefill)
            times[prefix + "decode"].append(decode)
    for prefix, one in in_turns():
        energy[prefix] = energy_per_token(one, prompt, decode_tokens)
    rates = {
        f"{name}_tokens_per_s": (prompt_tokens if "prefill" in name else decode_tokens)
        / statistics.median(seconds)
        for name, seconds in times.items()
    }
    return {
        **rates,
        "speedup": rates["decode_tokens_per_s"] / rates["baseline_decode_tokens_per_s"],
        **{f"{prefix}resident_bytes": resident_bytes(one) for prefix, one in models.items()},
        **{f"{prefix}peak_memory_bytes": found for prefix, (found, _) in memory.items()},
        "memory_note": memory[""][1],
        **{f"{prefix}energy_per_token_j": found for prefix, (found, _) in energy.items()},
        "energy_note": energy[""][1],
        "baseline_dtype": str(baseline.dtype).removeprefix("torch."),
        "kernel": kernel_names(model),
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "repeats": repeats,
    }


def random_prompt(model: PreTrainedModel, tokens: int) -> Tensor:
    """Ids `[1, tokens]`, int64, on the model's device; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(vocab, (1, tokens), generator=generator).to(model.device)


def generation_seconds(
    model: PreTrainedModel, prompt: Tensor, decode_tokens: int
) -> tuple[float, float]:
    """Seconds from the prompt `[1, tokens]` to its first token, and for `decode_tokens` more.

    Greedy, in the 16 bits or codes that the model has; it does not stop at an end-of-text token.
    """
    clock = _Clock(prompt.device)
    start = clock.now()
    _generate(model, prompt, decode_tokens, clock)
    first, last = clock.times[0], clock.times[-1]
    assert len(clock.times) == 1 + decode_tokens
    return first - start, last - first


def energy_per_token(
    model: PreTrainedModel,
    prompt: Tensor,
    decode_tokens: int,
    meter: EnergyMeter | None = None,
) -> tuple[float | None, str]:
    """(joules per decoded token, what was counted); without a counter (None, why).

    Prefill is left out. It generates again and again until `ENERGY_SECONDS` went into decoding.
    meter: None: of the prompt's device.
    """
    meter = meter or EnergyMeter(prompt.device)
    joules, seconds, tokens = 0.0, 0.0, 0
    while meter.why is None and seconds < ENERGY_SECONDS:
        clock = _Clock(prompt.device, meter)
        with meter:
            _generate(model, prompt, decode_tokens, clock)
        if meter.why is None:
            joules += clock.joules[-1] - clock.joules[0]
            seconds += clock.times[-1] - clock.times[0]
            tokens += decode_tokens
    if meter.why is not None:
        return None, f"not measurable: {meter.why}"
    return joules / tokens, str(meter.source)


def peak_memory(
    model: PreTrainedModel, prompt: Tensor, decode_tokens: int
) -> tuple[int | None, str]:
    """(bytes, how they were measured) of a model at most while it reads a prompt `[1, tokens]` and
    decodes; where the system does not tell (None, why).

    Its weights as the kernels hold them (`resident_bytes`), and what the process, or the GPU, took
    on top while it ran: keys, values, activations, weights dequantized on the way. So nothing else
    that the process holds counts, another model neither, and no code of libraries. Generate with
    the model once before: what is set up then is no part of it.
    """
    cuda = prompt.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.synchronize(prompt.device)
        before = torch.cuda.memory_allocated(prompt.device)
        torch.cuda.reset_peak_memory_stats(prompt.device)
    else:
        with contextlib.suppress(
            OSError, AttributeError
        ):  # other libraries give back by themselves
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed pages would be used unseen
        try:
            (PROC / "clear_refs").write_text("5")  # proc(5): the high-water mark starts again
            before = _status("VmRSS")
        except (OSError, KeyError) as error:
            return None, f"not measurable: {PROC}/clear_refs or status does not serve ({error})"
    _generate(model, prompt, decode_tokens, None)
    peak = torch.cuda.max_memory_allocated(prompt.device) if cuda else _status("VmHWM")
    how = "weights, and what the " + ("GPU" if cuda else "process") + " took on top"
    return resident_bytes(model) + max(0, peak - before), how


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status, which has them in kB."""
    lines = (PROC / "status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(found[name].split()[0]) * 1024


def _generate(
    model: PreTrainedModel, prompt: Tensor, decode_tokens: int, clock: _Clock | None
) -> None:
    model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1 + decode_tokens,
        eos_token_id=None,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([] if clock is None else [clock]),
    )


class _Clock(StoppingCriteria):
    """Stops nothing; notes when each token was there, and the energy until then."""

    def __init__(self, device: torch.device, meter: EnergyMeter | None = None) -> None:
        self.device = device
        self.meter = meter
        self.times: list[float] = []
        self.joules: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.times.append(self.now())
        if self.meter is not None:
            self.joules.append(self.meter.read() or 0.0)
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


def _tensors(value: object, seen: set[int]) -> list[Tensor]:
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
