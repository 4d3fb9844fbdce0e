"""Quantized models measured: size, speed, memory, time to quantize, and what exports lose.

    make demo && make bench-quant

On TinyLlama-1.1B's shape with random weights, two threads; exports on the demo's student. Prints
the tables and writes tests/bench/results/quant/KIND.json and the tables of docs/quantization.md.
Ends with exit code 1 if an aim is missed. `--only quantize|speed|memory|gguf|hf` measures one part
and keeps the figures of the others. Needs 16 GB of memory and 6 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.bench.figures import machine, read_result, result_file, write_result

ROOT = Path(__file__).parents[2]
RUN = ROOT / "runs" / "demo"
COMMAND = "make demo && make bench-quant"
PARTS = ("quantize", "speed", "memory", "gguf", "hf")
NEED_MODELS = ("quantize", "speed", "memory")


def aims(found: dict[str, Any]) -> dict[str, bool]:
    """What is aimed at, as far as it was measured, and whether it is reached."""
    reached = {}
    for key, bound, upper in (
        ("folder_ratio", 0.30, True),
        ("folder_ratio_8bit", 0.55, True),
        ("decode_speedup", 2.5, False),
        ("decode_memory_ratio", 0.4, True),
        ("quantize_s", 90, True),
    ):
        if key in found:
            sign = "at most" if upper else "at least"
            reached[f"{key} {sign} {bound}"] = (found[key] <= bound) == upper or (
                found[key] == bound
            )
    for length, bound in (("512", 0.5), ("2048", 0.8)):
        if "prefill_ratio" in found:
            reached[f"prefill of {length} tokens at least {bound} of bf16's speed"] = (
                found["prefill_ratio"][length] >= bound
            )
    if "gguf" in found:
        told = found["gguf"]
        reached["GGUF F32: our greedy tokens"] = told["f32"]["greedy_equal"]
        reached["GGUF Q4_1: mean KL at most .01"] = told["q4_1"]["kl"] <= 0.01
        reached["GGUF Q4_1: top-1 agreement at least 97 %"] = told["q4_1"]["top1"] >= 0.97
        reached["GGUF: tokenization equal on 100 texts"] = told["tokenization_equal"] and all(
            count == 100 for count in told["tokenized_equally"].values()
        )
    return reached


def models(folder: Path, layers: int) -> None:
    """Writes the 16-bit model and its quantized ones below `folder`, each by a fresh process."""
    for name in ("bf16", "4-bit", "8-bit", "2-bit", "int8-dynamic"):
        command = [sys.executable, "-m", "tests.bench.quant", "--make", name]
        command += ["--folder", str(folder), "--layers", str(layers)]
        subprocess.run(command, check=True, cwd=ROOT)


def make(name: str, folder: Path, layers: int, threads: int) -> None:
    """One model below `folder`, and what was measured on the way beside it."""
    import torch

    from tests.bench.quant_world import BASE, CELLS, write_base, write_cell

    torch.set_num_threads(threads)
    if name == BASE:
        write_base(folder / BASE, layers)
        return
    facts = write_cell(folder / BASE, folder / name, CELLS[name])
    (folder / f"{name}.json").write_text(json.dumps(facts))


def sizes(folder: Path) -> dict[str, Any]:
    """Folder sizes and seconds of quantizing."""
    from quant.artifact.sizes import folder_bytes
    from tests.bench.quant_world import BASE, CELLS, facts

    whole = folder_bytes(folder / BASE)
    by_name = {name: folder_bytes(folder / name) / whole for name in CELLS}
    told = {name: facts(folder, name) for name in CELLS}
    return {
        "folder_ratio": by_name["4-bit"],
        "folder_ratio_8bit": by_name["8-bit"],
        "folder_ratios": by_name,
        "folder_bytes": whole,
        "quantize_s": told["4-bit"]["quantize_s"],
        "quantize_s_per_1e9": 1e9 * told["4-bit"]["quantize_s"] / told["4-bit"]["weights"],
        "quantize_s_by_cell": {name: one["quantize_s"] for name, one in told.items()},
    }


def speeds(folder: Path, rounds: int, tokens: int, threads: int, compiled: bool) -> dict[str, Any]:
    """Decode and prefill, with the headline ratios."""
    from tests.bench import quant_speed
    from tests.bench.quant_world import BASE, CELLS

    found = quant_speed.measure(folder, [BASE, *CELLS], rounds, tokens, threads, compiled)
    over = quant_speed.ratios(found["tokens_per_s"])
    return {
        **found,
        "decode_speedup": over["4-bit"]["decode"],
        "decode_speedup_8bit": over["8-bit"]["decode"],
        "prefill_ratio": over["4-bit"]["prefill"],
        "over_bf16": over,
    }


def memory(folder: Path) -> dict[str, Any]:
    """Resident memory of decoding processes."""
    from tests.bench import quant_memory
    from tests.bench.quant_world import BASE, CELLS

    found = quant_memory.measure(folder, [BASE, *CELLS])
    base = found[BASE]
    return {
        "memory": found,
        "decode_memory_ratio": found["4-bit"]["decoding"] / base["decoding"],
        "decode_memory_ratio_8bit": found["8-bit"]["decoding"] / base["decoding"],
        "highest_memory_ratio": found["4-bit"]["highest"] / base["highest"],
    }


def part(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one part."""
    if name == "quantize":
        from tests.bench import quantize_speed

        beside = quantize_speed.measure(2048, 5632, 4, 64, 1, 3)
        return {**sizes(folder), "quantize_beside_hqq": beside}
    if name == "speed":
        return speeds(folder, options.rounds, options.tokens, 2, not options.eager_only)
    if name == "memory":
        return memory(folder)
    if name == "gguf":
        from tests.bench import quant_gguf

        return {"gguf": quant_gguf.measure(RUN / "student")}
    from tests.bench import quant_hf

    return {"hf": quant_hf.measure_run(RUN)}


def missing(wanted: list[str]) -> str | None:
    """Why the asked parts cannot be measured, before hours are spent on the others."""
    if set(wanted) & {"gguf", "hf"} and not (RUN / "student" / "config.json").is_file():
        return f"{RUN}/student is not there: run make demo first"
    if "gguf" in wanted and find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed: make bench-quant installs it"
    return None


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    names = ("torch", "transformers", "hqq", "gguf", "compressed-tensors", "llama-cpp-python")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> int:
    """The command above."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--layers", type=int, default=22, help="fewer: to try it out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--eager-only", action="store_true", help="without torch.compile")
    parser.add_argument("--folder", help="keep the models there, and use those that are there")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, Path(options.folder), options.layers, 2)
        return 0
    from tests.bench import quant_docs

    wanted = [options.only] if options.only else list(PARTS)
    if why := missing(wanted):
        print(f"error: {why}", file=sys.stderr)
        return 2
    path = result_file("quant")
    found: dict[str, Any] = read_result(path) if options.only else {}
    folder = Path(options.folder or tempfile.mkdtemp(prefix="stillhouse-bench-"))
    try:
        if set(wanted) & set(NEED_MODELS) and not (folder / "int8-dynamic").is_dir():
            models(folder, options.layers)
        for name in wanted:
            began = time.monotonic()
            found |= part(name, folder, options)
            seconds = {**found.get("seconds", {}), name: round(time.monotonic() - began)}
            found |= {
                "command": COMMAND,
                "shape": f"TinyLlama-1.1B's, {options.layers} layers, random weights",
                "aims": aims(found),
                "seconds": seconds,
                "machine": machine(),
                "versions": versions(),
            }
            if options.layers == 22:  # after each part: what fails later loses itself alone
                write_result(path, found)
                quant_docs.write()
    finally:
        if not options.folder:
            shutil.rmtree(folder)
    print(quant_docs.text(found))
    for aim, reached in found["aims"].items():
        print(f"{'reached' if reached else 'MISSED '}  {aim}")
    return 0 if all(found["aims"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
