"""A tiny job for tests of the whole pipeline, and the command line as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cluster.storage import Store, open_store, read_events

from tests.material import write_texts  # isort: skip


def model(width: int, layers: int) -> dict[str, Any]:
    """An inline Llama config."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }


def teacher_spec(folder: Path, documents: int = 400) -> dict[str, Any]:
    """Plain training of a teacher on made-up texts, below `folder`."""
    glob = write_texts(folder / "texts", documents=documents)
    return {
        "name": "teacher",
        "storage": str(folder / "runs"),
        "teacher": None,
        "student": {"init": "random", "config": model(64, 2)},
        "tokenizer": {"train": 400},
        "data": {
            "train": [{"source": glob}],
            "sequence_length": 64,
            "select_sequences": 8,
            "report_sequences": 8,
        },
        "distill": {
            "losses": {"ce": 1.0},
            "steps": 30,
            "tokens_per_step": 512,
            "learning_rate": 0.003,
            "dtype": "float32",
        },
        "sweep": None,
        "tracking": {"mode": "disabled"},
    }


def job_spec(folder: Path, documents: int = 400, **changes: Any) -> dict[str, Any]:
    """Distillation from that teacher, with a control, and four cells; `changes` by dotted key."""
    spec = teacher_spec(folder, documents)
    spec |= {
        "name": "job",
        "teacher": {"model": str(folder / "runs" / "teacher" / "student"), "dtype": "float32"},
        "student": {"init": "random", "config": model(32, 1)},
        "tokenizer": None,
        "cache": {"method": "topk", "k": 16},
        "sweep": {
            "bits": [8, 4],
            "group_size": [16, 32],
            "speed_prompt_tokens": 16,
            "speed_decode_tokens": 4,
        },
    }
    spec["distill"] = {
        **spec["distill"],
        "losses": {"forward_kl": 0.9, "ce": 0.1},
        "control": True,
    }
    for key, value in changes.items():
        place = spec
        *path, last = key.split("__")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return spec


def write_spec(spec: dict[str, Any], folder: Path) -> Path:
    """The spec as a YAML file."""
    path = folder / f"{spec['name']}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def run_store(spec: dict[str, Any]) -> Store:
    """The run directory of a spec."""
    return open_store(spec["storage"]).sub(spec["name"])


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, with what every run of the tests needs."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **changes}


def start(*arguments: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """`stillhouse ARGUMENTS` in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *arguments],
        cwd=cwd,
        env=environment(**env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def stillhouse(
    *arguments: str, cwd: Path, timeout: float = 400, **env: str
) -> tuple[int, str, str]:
    """Runs the command line to its end; returns exit code, stdout and stderr."""
    process = start(*arguments, cwd=cwd, **env)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end after {timeout} s\n{out}\n{err}") from None
    return process.returncode, out, err


def wait_for(
    store: Store, wanted: Callable[[dict[str, Any]], bool], process: subprocess.Popen[str]
) -> dict[str, Any]:
    """The first event that `wanted` likes; fails if the process ends before."""
    while True:
        ended = process.poll() is not None
        for event in read_events(store):
            if wanted(event):
                return event
        if ended:
            out, err = process.communicate()
            raise AssertionError(f"ended before the event came ({process.returncode}): {out}{err}")
        time.sleep(0.2)


def losses(store: Store, stage: str) -> dict[int, str]:
    """The loss of every step of a stage, exactly, by step."""
    return {
        event["step"]: float(event["loss"]).hex()
        for event in read_events(store)
        if event["event"] == "step" and event["stage"] == stage
    }


def results(store: Store) -> list[dict[str, Any]]:
    """The rows of the run's report."""
    return json.loads(store.read_text("report/results.json"))["rows"]
