"""Decoding with 4 bits against 16 and 32 bits and llama.cpp, on the same weights, in turns.

    python -m tests.bench.decoding MODEL [--peer PYTHON]      (four minutes)

MODEL: a 16-bit folder of Llama or Qwen3. PYTHON: an interpreter that has xllamacpp (`pip install
xllamacpp`, which has wheels); without it llama.cpp is left out. llama.cpp runs our GGUF export of
the quantized model. Tokens per second for one sequence after a prompt of 16 tokens, medians of
rounds in which all take turns, on 1 and on 2 threads; and the seconds from the start of `stillhouse
generate` to its first character. Kept in results/decoding/<kind>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quant.artifact import load_quantized
from quant.evaluation.speed import generation_seconds, random_prompt
from quant.export.gguf.export import export_gguf
from quant.kernels import kernel_names
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from tests.bench.docs import figure, fill, table
from tests.bench.figures import machine, result_file, tables_by_kind, write_result
from trainer.processor import cpu_dtype

PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"
PROMPT, TOKENS = 16, 32
PEER = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, threads = sys.argv[1], int(sys.argv[2])
params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, True, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
print(json.dumps({"system": str(xllamacpp.get_system_info()).strip()}), flush=True)
for line in sys.stdin:
    asked = {"prompt": list(range(5, 21)), "n_predict": int(line), "ignore_eos": True,
             "temperature": 0.0, "cache_prompt": False}
    answer = server.handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    print(json.dumps(answer["timings"]), flush=True)
"""


class Peer:
    """llama.cpp in a process of its own, which waits for its turn."""

    def __init__(self, python: str, file: Path, threads: int) -> None:
        command = [python, "-c", PEER, str(file), str(threads)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.system = str(self._answer()["system"])

    def rate(self) -> float:
        """Tokens per second of decoding."""
        assert self.process.stdin is not None
        print(TOKENS, file=self.process.stdin, flush=True)
        return float(self._answer()["predicted_per_second"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # llama.cpp may write lines of its own
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError("llama.cpp ended without an answer")


def rates(
    models: dict[str, PreTrainedModel], peer: Peer | None, rounds: int
) -> dict[str, list[float]]:
    """Tokens per second by model and round; the first turn of each is not counted."""
    found: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for name, model in models.items():
            _, seconds = generation_seconds(model, random_prompt(model, PROMPT), TOKENS)
            if turn:
                found.setdefault(name, []).append(round(TOKENS / seconds, 1))
        if peer is not None:
            rate = peer.rate()
            if turn:
                found.setdefault("llama.cpp", []).append(round(rate, 1))
    return found


def first_token_seconds(folder: Path) -> float:
    """From the start of the command to the first character of its text."""
    command = [
        sys.executable,
        "-c",
        "from jobs.cli.main import main; main()",
        "generate",
        str(folder),
    ]
    command += ["--prompt", "The import statement", "--max-new-tokens", "4"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise RuntimeError("generate wrote nothing")
        seconds = time.perf_counter() - began
        process.stdout.read()
    return round(seconds, 2)


def measure(source: Path, python: str | None, rounds: int) -> dict[str, Any]:
    """All figures, with ratios of medians by number of threads."""
    load = AutoModelForCausalLM.from_pretrained
    models = {
        "bfloat16": load(source, dtype=torch.bfloat16).eval(),
        "float32": load(source, dtype=torch.float32).eval(),
    }
    found: dict[str, Any] = {"model": source.name, "machine": machine(), "threads": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = Path(scratch) / "4bit", Path(scratch) / "model.gguf"
        model = quantize(load(source, dtype=torch.bfloat16).eval(), QuantSpec(4, 64))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        export_gguf(model, source, file)
        del model
        quantized = load_quantized(folder)
        if quantized.dtype != getattr(torch, cpu_dtype()):
            quantized.to(getattr(torch, cpu_dtype()))
        models["4 bits"] = quantized
        found["kernel"] = kernel_names(quantized)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            peer = None if python is None else Peer(python, file, threads)
            try:
                per_model = rates(models, peer, rounds)
            finally:
                if peer is not None:
                    found["llama.cpp"] = peer.system
                    peer.close()
            medians = {name: statistics.median(each) for name, each in per_model.items()}
            best = max(medians["bfloat16"], medians["float32"])
            ratios = {"to the better of bfloat16 and float32": medians["4 bits"] / best}
            if "llama.cpp" in medians:
                ratios["to llama.cpp"] = medians["4 bits"] / medians["llama.cpp"]
            print(threads, "threads:", medians, ratios, file=sys.stderr, flush=True)
            found["threads"][threads] = {
                "tokens_per_s": medians,
                "rounds": per_model,
                "ratio": {name: round(value, 2) for name, value in ratios.items()},
            }
        found["first_token_s"] = [first_token_seconds(folder) for _ in range(3)]
    return found


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Tokens per second by model and number of threads, for the docs."""
    columns = list(found["threads"].values())
    rows = [
        [name, *(figure(column["tokens_per_s"].get(name), 1) for column in columns)]
        for name in columns[0]["tokens_per_s"]
    ]
    for name in columns[0]["ratio"]:
        rows.append([f"4 bits {name}", *(figure(column["ratio"][name], 2) for column in columns)])
    seconds = statistics.median(found["first_token_s"])
    rows.append(["seconds to the first character", figure(seconds, 1), ""])
    heads = [f"{count} thread{'s' * (count != '1')}" for count in map(str, found["threads"])]
    return {"decoding": table(["decode tokens/s", *heads], rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", help="an interpreter that has xllamacpp")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    found = measure(asked.model, asked.peer, asked.rounds)
    write_result(result_file("decoding"), found)
    fill(PAGE, tables_by_kind("decoding", tables))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
