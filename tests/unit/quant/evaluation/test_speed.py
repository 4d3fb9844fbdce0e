from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import quant.evaluation.speed
from quant.artifact.sizes import true_bytes
from quant.codes import Codes
from quant.evaluation.energy import EnergyMeter
from quant.evaluation.speed import (
    energy_per_token,
    generation_seconds,
    load_baseline,
    measure_speed,
    peak_memory,
    random_prompt,
    resident_bytes,
)
from quant.kernels import use_kernels
from quant.layers.linear import QuantLinear
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from tests.unit.quant.conftest import tiny_llama
from trainer.models.load import load_for_inference

MB = 1 << 20


def watch(model, calls: list[tuple[str, int]], name: str = ""):
    """Notes the number of tokens of each forward pass of `model`."""
    model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((name, kwargs["input_ids"].numel())),
        with_kwargs=True,
    )
    return model


def test_speed_counts_the_tokens_it_ran_in_turns(make_llama):
    """Each model sees the prompt once per round, then single tokens with a growing cache; memory
    and energy have generations of their own, before and after."""
    calls: list[tuple[str, int]] = []
    one, other = watch(make_llama(), calls, "A"), watch(make_llama(), calls, "B")
    found = measure_speed(one, other, prompt_tokens=5, decode_tokens=3, repeats=2)
    warm_up = [(name, n) for name in "AB" for n in (5, 1, 1)]
    rounds = [(name, n) for name in "AB" for n in (5, 1, 1, 1)]
    assert calls[: len(warm_up) + 3 * len(rounds)] == warm_up + 3 * rounds
    if found["energy_per_token_j"] is None:
        assert len(calls) == len(warm_up) + 3 * len(rounds)
        assert found["energy_note"].startswith("not measurable: ")
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
    monkeypatch.setattr(
        quant.evaluation.speed, "time", SimpleNamespace(perf_counter=lambda: passed)
    )
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


@pytest.mark.parametrize("faster", ["bfloat16", "float32"])
def test_the_baseline_has_the_dtype_that_decodes_faster(faster, make_llama, tmp_path, monkeypatch):
    """By a clock that the model's passes move: decoded tokens count, prompts do not."""
    make_llama().save_pretrained(tmp_path)
    passed = 0.0

    def tick(module, args, kwargs):
        nonlocal passed
        slow = str(module.dtype) != f"torch.{faster}"
        passed += (2 if slow else 1) if kwargs["input_ids"].shape[1] == 1 else (10 if slow else 100)

    def load(*args):
        model = load_for_inference(*args)
        model.register_forward_pre_hook(tick, with_kwargs=True)
        return model

    monkeypatch.setattr("trainer.models.load.load_for_inference", load)
    monkeypatch.setattr(
        quant.evaluation.speed, "time", SimpleNamespace(perf_counter=lambda: passed)
    )
    model = load_baseline(tmp_path, "cpu", 6, 4)
    assert str(model.dtype) == f"torch.{faster}"
    found = measure_speed(model, model, prompt_tokens=6, decode_tokens=4, repeats=1)
    assert found["baseline_dtype"] == faster


def test_a_model_that_memory_holds_once_is_not_loaded_twice(make_llama, tmp_path, monkeypatch):
    make_llama().save_pretrained(tmp_path)
    loaded: list[str] = []

    def load(folder, device, dtype):
        loaded.append(str(dtype))
        return load_for_inference(folder, device, dtype)

    monkeypatch.setattr("trainer.models.load.load_for_inference", load)
    stored = (tmp_path / "model.safetensors").stat().st_size
    memory = SimpleNamespace(available=5 * stored)
    monkeypatch.setattr(quant.evaluation.speed.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(quant.evaluation.speed, "fast_dtype", lambda device: "float32")
    assert load_baseline(tmp_path, "cpu", 6, 4).dtype == torch.float32
    assert loaded == ["torch.float32"]


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


def linux() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


needs_marks = pytest.mark.skipif(not linux(), reason="no high-water mark of this process")


@needs_marks
@pytest.mark.parametrize("pieces", [1, 1024])
def test_peak_memory_is_the_weights_and_what_a_pass_takes(pieces):
    """In a process of its own: a heap that many tests have cut up takes less anew."""
    module = "tests.unit.quant.evaluation.test_speed"
    script = f"import sys; from {module} import peaks; peaks(int(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(pieces)]
    root = Path(__file__).parents[4]
    subprocess.run(command, cwd=root, check=True)


def peaks(pieces: int) -> None:
    """64 MB that each pass of a token takes for itself, at once or in pieces that the heap keeps
    after they are freed; they were taken once before."""
    torch.set_num_threads(1)
    model = tiny_llama()
    prompt = random_prompt(model, 5)
    held: list[torch.Tensor] = []

    def take(module, arguments, keywords):
        if keywords["input_ids"].shape[1] == 1:
            held.extend(torch.ones(64 * MB // 4 // pieces) for _ in range(pieces))

    def give(*_):
        held.clear()

    generation_seconds(model, prompt, 3)
    small, how = peak_memory(model, prompt, 3)
    assert how == "weights, and what the process took on top"
    assert small is not None and resident_bytes(model) <= small < resident_bytes(model) + 8 * MB
    hooks = [
        model.register_forward_pre_hook(take, with_kwargs=True),
        model.register_forward_hook(give),
    ]
    generation_seconds(model, prompt, 3)
    keep = torch.ones(10)  # something small above what was freed
    large, _ = peak_memory(model, prompt, 3)
    for hook in hooks:
        hook.remove()
    assert large is not None and abs(large - small - 64 * MB) < 6 * MB, keep.sum()


@needs_marks
def test_what_else_a_process_holds_or_held_is_not_in_a_models_peak(make_llama):
    """Beside a large model, and after a pass that took much."""
    model = make_llama()
    prompt = random_prompt(model, 5)
    generation_seconds(model, prompt, 3)
    other = torch.ones(200 * MB // 4)
    before = torch.ones(300 * MB // 4)
    del before
    found, _ = peak_memory(model, prompt, 3)
    assert found is not None and found < resident_bytes(model) + 8 * MB
    assert other.sum() > 0


def test_peaks_of_both_models_are_in_the_result(make_llama):
    model, original = quantize(make_llama(), QuantSpec(4, 32)), make_llama()
    found = measure_speed(model, original, prompt_tokens=5, decode_tokens=2, repeats=1)
    if found["peak_memory_bytes"] is None:
        assert found["memory_note"].startswith("not measurable: ")
    else:
        assert found["peak_memory_bytes"] >= found["resident_bytes"]
        assert found["baseline_peak_memory_bytes"] >= found["baseline_resident_bytes"]


def test_where_the_system_tells_no_peak_the_note_says_why(make_llama, monkeypatch, tmp_path):
    monkeypatch.setattr(quant.evaluation.speed, "PROC", tmp_path / "gone")
    model = make_llama()
    found, why = peak_memory(model, random_prompt(model, 5), 2)
    assert found is None and why.startswith(f"not measurable: {tmp_path}/gone/clear_refs")


def test_energy_is_that_of_decoded_tokens_alone(make_llama, monkeypatch, tmp_path):
    """By counters and a clock that only the model's passes move: a prompt takes 1000 J, a token
    2 J and half a second."""
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    for name, text in {"name": "package-0", "max_energy_range_uj": str(10**12)}.items():
        (folder / name).write_text(text)
    energy, passed, prompts = 0, 0.0, 0
    (folder / "energy_uj").write_text("0")

    def work(_, arguments, keywords):
        nonlocal energy, passed, prompts
        if keywords["input_ids"].shape[1] > 1:
            energy, passed, prompts = energy + 1000 * 10**6, passed + 100, prompts + 1
        else:
            energy, passed = energy + 2 * 10**6, passed + 0.5
        (folder / "energy_uj").write_text(str(energy))

    model = make_llama(num_hidden_layers=1)
    model.register_forward_pre_hook(work, with_kwargs=True)
    monkeypatch.setattr(
        quant.evaluation.speed, "time", SimpleNamespace(perf_counter=lambda: passed)
    )
    meter = EnergyMeter("cpu", tmp_path)
    found = energy_per_token(model, random_prompt(model, 6), 3, meter)
    assert found == (2.0, "CPU packages by RAPL")
    assert prompts == 2, "1.5 seconds of decoding are too few for a counter, 3 are enough"


def test_energy_that_is_not_measurable_costs_no_pass(make_llama, tmp_path):
    calls: list[tuple[str, int]] = []
    model = watch(make_llama(), calls)
    found = energy_per_token(model, random_prompt(model, 6), 3, EnergyMeter("cpu", tmp_path))
    assert found[0] is None and calls == []
    assert found[1].startswith(f"not measurable: no RAPL counters in {tmp_path}")
