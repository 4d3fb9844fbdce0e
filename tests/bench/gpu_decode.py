"""4-bit and 8-bit against bf16 on a GPU: decoding, prompts and memory at 1.1B and 8B shapes.

    python tests/bench/gpu_decode.py                 # on a GPU: "decode" of results/gpu/KIND.json
    python tests/bench/gpu_decode.py --device cpu --shapes tiny --tokens 4    # does it run?

Needs torch, transformers and safetensors alone. Weights and codes are random. Both sides of a
ratio take turns in one process and get the same treatments (`gpu_steps`); `speedup` compares each
at its own best one. Times are medians. On a GPU every case has a process of its own, so that one
which breaks the device costs the others nothing; compilation is tried for the first case alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from quant.evaluation.speed import resident_bytes  # noqa: E402
from quant.kernels import kernel_names, use_kernels  # noqa: E402
from tests.bench.figures import read_result, result_file, write_result  # noqa: E402
from tests.bench.gpu_models import CASES, SHAPES, config_of, disagreement, make_model  # noqa: E402
from tests.bench.gpu_steps import Decoder, Prefill  # noqa: E402

GOAL = 2.4  # 4-bit over bf16, tokens per second
LIMIT_S = 300  # of a case's process
PROMPT, TOKENS, ROUNDS = 128, 64, 7
PREFILLS = {"tiny": (16,), "1.1b": (512, 2048), "8b": (512, 2048)}


def measure(
    shapes: list[str], cases: list[str], device: torch.device, tokens: int = TOKENS
) -> dict[str, Any]:
    """All cases at all shapes by name; what could not be measured, and why, under failed."""
    failed: dict[str, str] = {}
    found: dict[str, Any] = {shape: {} for shape in shapes}
    for shape in shapes:
        for case in cases:
            one = _isolated if device.type == "cuda" else _in_process
            try:
                found[shape][case], missing = one(shape, case, device, tokens)
            except Exception as error:  # whatever it is, the other cases are measured
                missing = {"": _first_line(error)}
            failed |= {f"{shape}/{case}/{what}".rstrip("/"): why for what, why in missing.items()}
    return {**found, "goal": GOAL, "prompt": PROMPT, "tokens": tokens, "failed": failed}


def _isolated(
    shape: str, case: str, device: torch.device, tokens: int
) -> tuple[dict[str, Any], dict[str, str]]:
    command = [sys.executable, __file__, "--one", shape, case, "--tokens", str(tokens)]
    done = subprocess.run(
        [*command, "--device", str(device)], capture_output=True, text=True, timeout=LIMIT_S
    )
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(told[-1] if told else f"ended with {done.returncode}")
    found, failed = json.loads(done.stdout.splitlines()[-1])
    return found, failed


def _in_process(
    shape: str, case: str, device: torch.device, tokens: int
) -> tuple[dict[str, Any], dict[str, str]]:
    with torch.no_grad():
        return measure_case(shape, case, device, tokens)


def measure_case(
    shape: str, case: str, device: torch.device, tokens: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """One case at one shape beside bf16: (figures, what failed and why)."""
    failed: dict[str, str] = {}
    # Layers of every width under the chosen kernels beside the plain path: fast and wrong is no
    # result.
    probe = make_model(config_of(shape, layers=1), CASES[case], device)
    use_kernels(probe, "plain")
    plain = disagreement(probe)
    use_kernels(probe, "speed")
    found: dict[str, Any] = {"relative_error": round(disagreement(probe, plain), 5)}
    del probe

    sides: dict[str, Any] = {}
    for name in ("bf16", case):
        before = _allocated(device)
        sides[name] = make_model(config_of(shape), CASES.get(name), device)
        use_kernels(sides[name], "speed")
        gc.collect()
        found[f"{name}_weights_gb"] = round(resident_bytes(sides[name]) / 1e9, 3)
        if device.type == "cuda":
            found[f"{name}_allocated_gb"] = round((_allocated(device) - before) / 1e9, 3)
    found["kernels"] = kernel_names(sides[case])
    found["decode_tokens_per_s"], found["speedup"] = {}, None
    for way in _ways(case, device):
        try:
            rates = _decode(sides, way, tokens)
        except Exception as error:
            failed[f"decode_{way}"] = _first_line(error)
            continue
        found["decode_tokens_per_s"][way] = rates
    if device.type == "cuda":
        found |= {f"{name}_decode_gb": _decode_gb(model, tokens) for name, model in sides.items()}
    best = {
        name: max((rates[name] for rates in found["decode_tokens_per_s"].values()), default=0.0)
        for name in sides
    }
    if best[case]:
        found["speedup"] = round(best[case] / best["bf16"], 3)
    for prompt in PREFILLS[shape]:
        for way in ("eager", "graph") if device.type == "cuda" else ("eager",):
            try:
                rates = _prefill(sides, prompt, way)
            except Exception as error:
                failed[f"prefill_{prompt}_{way}"] = _first_line(error)
                continue
            rates["ratio"] = round(rates[case] / rates["bf16"], 3)
            found.setdefault("prefill_tokens_per_s", {}).setdefault(str(prompt), {})[way] = rates
    return found, failed


def _ways(case: str, device: torch.device) -> list[str]:
    if device.type != "cuda":
        return ["eager"]
    return ["eager", "graph", *(["compile"] if case == next(iter(CASES)) else [])]


def _decode(sides: dict[str, Any], way: str, tokens: int) -> dict[str, float]:
    length = PROMPT + tokens + 64
    decoders = {name: Decoder(model, PROMPT, length, way) for name, model in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, decoder in decoders.items():
            times[name].append(decoder.seconds_per_token(tokens))
    return {name: round(1 / statistics.median(took), 2) for name, took in times.items()}


def _decode_gb(model: Any, tokens: int) -> float:
    """Weights as they are held, and the most that decoding takes beside them."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    Decoder(model, PROMPT, PROMPT + tokens + 64, "eager").seconds_per_token(tokens)
    beside = torch.cuda.max_memory_allocated() - before
    return round((resident_bytes(model) + beside) / 1e9, 3)


def _prefill(sides: dict[str, Any], prompt: int, way: str) -> dict[str, float]:
    runs = {name: Prefill(model, prompt, way) for name, model in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(run.seconds())
    return {name: round(prompt / statistics.median(took), 1) for name, took in times.items()}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def facts(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on and with."""
    versions = {"torch": torch.__version__}
    for name in ("transformers", "safetensors", "triton", "gemlite"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {"device": name, "versions": versions, "command": "python tests/bench/gpu_decode.py"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.1b", "8b"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--out", type=Path, help="not results/gpu/KIND.json")
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "CASE"), help="as JSON on one line")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here; try --device cpu --shapes tiny", file=sys.stderr)
        return 2
    if asked.one:
        print(json.dumps(_in_process(*asked.one, device, asked.tokens)))
        return 0
    found = {**measure(asked.shapes, asked.cases, device, asked.tokens), **facts(device)}
    print(json.dumps(found, indent=2))
    if device.type == "cuda":
        path = asked.out or result_file("gpu", "cuda")
        write_result(path, {**read_result(path), "decode": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
