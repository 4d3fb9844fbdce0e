from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import quant.speed
from quant.bytes import true_bytes
from quant.codes import Codes
from quant.kernels import use_kernels
from quant.linear import QuantLinear
from quant.quantize import quantize
from quant.spec import QuantSpec
from quant.speed import generation_seconds, measure_speed, resident_bytes


def watch(model, calls: list[tuple[str, int]], name: str = ""):
    """Notes the number of tokens of each forward pass of `model`."""
    model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((name, kwargs["input_ids"].numel())),
        with_kwargs=True,
    )
    return model


def test_speed_counts_the_tokens_it_ran_in_turns(make_llama):
    """Each model sees the prompt once per round, then single tokens with a growing cache."""
    calls: list[tuple[str, int]] = []
    one, other = watch(make_llama(), calls, "A"), watch(make_llama(), calls, "B")
    found = measure_speed(one, other, prompt_tokens=5, decode_tokens=3, repeats=2)
    warm_up = [(name, n) for name in "AB" for n in (5, 1, 1)]
    rounds = [(name, n) for name in "AB" for n in (5, 1, 1, 1)]
    assert calls == warm_up + 2 * rounds
    assert found["speedup"] == found["decode_tokens_per_s"] / found["baseline_decode_tokens_per_s"]
    assert (found["prompt_tokens"], found["decode_tokens"], found["repeats"]) == (5, 3, 2)


def test_seconds_are_of_the_prompt_and_of_the_tokens_after_it(make_llama, monkeypatch):
    """By a clock that only the model's passes move: 100 for a prompt, 1 for a token."""
    passed = 0.0

    def tick(_, args, kwargs):
        nonlocal passed
        passed += 100 if kwargs["input_ids"].shape[1] > 1 else 1

    model = make_llama(num_hidden_layers=1)
    model.register_forward_pre_hook(tick, with_kwargs=True)
    monkeypatch.setattr(quant.speed, "time", SimpleNamespace(perf_counter=lambda: passed))
    assert generation_seconds(model, torch.zeros(1, 6, dtype=torch.long), 4) == (100, 4)
    found = measure_speed(model, model, prompt_tokens=50, decode_tokens=6)
    assert (found["prefill_tokens_per_s"], found["decode_tokens_per_s"]) == (0.5, 1.0)


def test_what_a_models_own_settings_say_about_stopping_and_drawing_is_left_out(make_llama):
    calls: list[tuple[str, int]] = []
    model = watch(make_llama(), calls)
    settings = model.generation_config
    settings.eos_token_id, settings.max_length = list(range(256)), 7
    settings.do_sample, settings.temperature, settings.num_beams = True, 0.5, 2
    generation_seconds(model, torch.zeros(1, 6, dtype=torch.long), 3)
    assert calls == [("", 6), ("", 1), ("", 1), ("", 1)]


def test_a_text_beyond_the_models_positions_is_refused(make_llama):
    model = make_llama()
    with pytest.raises(ValueError, match="= 132 exceeds the model's 128 positions"):
        measure_speed(model, model, prompt_tokens=128, decode_tokens=4)


def test_resident_bytes_are_the_stored_ones_where_a_kernel_adds_none(make_llama):
    dense = make_llama(tied=True)
    computed = sum(b.numel() * b.element_size() for b in dense.buffers())
    assert resident_bytes(dense) == true_bytes(dense) + computed
    model = quantize(make_llama(tied=True), QuantSpec(4, 32))
    assert resident_bytes(model) == true_bytes(model) + computed


def test_resident_bytes_count_what_is_held_once():
    """A layer under two names once, a view of a tensor not at all, a tensor in a list too."""
    codes = Codes(
        torch.zeros(16, 32, dtype=torch.uint8),
        torch.ones(16, 1).half(),
        torch.ones(16, 1).half(),
        8,
    )
    layer = QuantLinear.from_codes(codes)
    both = torch.nn.ModuleDict({"a": layer, "b": layer})
    own = 16 * 32 + 2 * 16 * 2
    assert resident_bytes(both) == own
    layer.aside = [torch.zeros(10, dtype=torch.int32)]  # type: ignore[assignment]
    layer.seen = layer.codes[3:5]
    assert resident_bytes(both) == own + 40


@pytest.mark.parametrize("prefer", ["speed", "memory", "plain"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_resident_bytes_are_those_of_a_kernels_layout(bits, prefer):
    """2-bit codes take 4 bits each where speed is asked for, and nothing holds codes twice."""
    rows, columns, groups = 128, 256, 128 * 256 // 64
    scale, zero = torch.rand(2, rows, columns // 64).half()
    codes = torch.randint(2**bits, (rows, columns)).to(torch.uint8)
    layer = QuantLinear.from_codes(Codes(codes, scale, zero, bits))
    before = resident_bytes(layer)
    assert before == rows * columns * bits // 8 + 4 * groups
    kernel = use_kernels(layer, prefer)[""]
    taken = 4 if (bits, prefer) == (2, "speed") and not kernel.startswith("plain") else bits
    least = rows * columns * taken // 8 + 4 * groups
    own = 0 if kernel.startswith("plain") else 8  # bytes of the kernel's own per group
    assert least <= resident_bytes(layer) <= least + own * groups
