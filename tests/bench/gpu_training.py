"""Training through `torchrun -m trainer` on one machine: tokens/s of CE, cached and online.

    python -m tests.bench.gpu_training                 # on a GPU
    python -m tests.bench.gpu_training --size tiny     # does it run? also without a GPU

Writes results/gpu_training/KIND.json. Needs torch, transformers, DeepSpeed and what `trainer`
imports, but neither Ray nor hqq. The weights are random: speeds do not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from cluster.storage import open_store, read_events
from tests.bench.figures import result_file, write_result

ROOT = Path(__file__).parents[2]
STEPS, SKIPPED = 30, 6
WAYS = {
    "ce": {"mode": "cached", "losses": {"ce": 1.0}},
    "cached_sample": {"mode": "cached", "losses": {"forward_kl": 1.0}},
    "online": {"mode": "online", "losses": {"forward_kl": 1.0}},
}
# width, layers, heads, vocabulary, tokens of a sequence, sequences of a step
SIZES: dict[str, dict[str, Any]] = {
    "full": {"teacher": (4096, 16, 32), "student": (1024, 12, 16), "length": 2048, "batch": 16},
    "tiny": {"teacher": (64, 2, 4), "student": (32, 1, 4), "length": 64, "batch": 4},
}
VOCAB = 2048


def config(width: int, layers: int, heads: int) -> dict[str, Any]:
    """A Llama."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 8 * width // 3 // 32 * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": True,
    }


def spec_of(name: str, root: Path, size: dict[str, Any]) -> dict[str, Any]:
    """One way's spec."""
    tokens = size["batch"] * size["length"]
    return {
        "name": name.replace("_", "-"),
        "storage": str(root / "runs"),
        "teacher": {"model": str(root / "teacher"), "sharding": "none"},
        "student": {"init": "random", "config": config(*size["student"])},
        "data": {
            "train": [{"source": "builtin:python-docs"}],
            "sequence_length": size["length"],
            "select_sequences": 4,
            "report_sequences": 4,
            "packing": "concat",
            "max_tokens": 4 * tokens,
        },
        "cache": {"method": "sample", "draws": 50},
        "distill": {
            **WAYS[name],
            "steps": STEPS,
            "tokens_per_step": tokens,
            "learning_rate": 1e-3,
            "evaluate_steps": None,
            "activation_checkpointing": False,
        },
    }


def make_teacher(root: Path, size: dict[str, Any]) -> None:
    """A teacher with random weights and a tokenizer of the prose that ships with Python."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.corpus.python_docs import documents, ranges
    from trainer.corpus.tokenizer import load_tokenizer, train_tokenizer
    from trainer.models.load import new_config

    folder = root / "teacher"
    texts = (text for start, stop in ranges() for text in documents(start, stop))
    train_tokenizer(texts, VOCAB, folder)
    tokenizer = load_tokenizer(folder)
    made = new_config("teacher", config(*size["teacher"]), tokenizer, size["length"])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(made).to(torch.bfloat16).save_pretrained(folder)


def run(name: str, root: Path, size: dict[str, Any], processes: int) -> dict[str, float]:
    """One training; tokens/s and the loader's wait, medians over the steps after the first ones."""
    spec = spec_of(name, root, size)
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
         "--master-addr", "127.0.0.1", "--master-port", "0", "-m", "trainer", str(path)],
        cwd=ROOT, check=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    events = read_events(open_store(spec["storage"]).sub(spec["name"]))
    steps = [event for event in events if event["event"] == "step"][SKIPPED:]
    return {
        "tokens_per_s": round(statistics.median(step["tokens_per_s"] for step in steps), 1),
        "loader_wait_ms": round(statistics.median(step["loader_wait_ms"] for step in steps), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--processes", type=int, default=1)
    asked = parser.parse_args()
    import torch

    if asked.size == "full" and not torch.cuda.is_available():
        print("error: torch sees no GPU here; try --size tiny", file=sys.stderr)
        return 2
    size = SIZES[asked.size]
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as folder:
        root = Path(folder)
        make_teacher(root, size)
        found: dict[str, Any] = {name: run(name, root, size, asked.processes) for name in WAYS}
    found |= {
        "command": "python -m tests.bench.gpu_training",
        "sizes": size,
        "processes": asked.processes,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": {"torch": torch.__version__},
    }
    print(json.dumps(found, indent=2))
    if asked.size == "full":
        write_result(result_file("gpu_training", "cuda"), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
