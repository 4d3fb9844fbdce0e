"""The memory that `stillhouse plan` foretells of a training is what a real one takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.corpora import WORDS, make_corpus, write_texts
from tests.fixtures.ranks import Ranks, start

# Of at least 300 million parameters each, unlike in everything that memory depends on.
CASES: dict[str, dict[str, Any]] = {
    "two ranks, ZeRO-2, tied": {
        "world": 2,
        "vocab": 320,
        "length": 256,
        "config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 20,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        "distill": {"tokens_per_step": 512, "micro_batch": 2, "zero_stage": 2},
    },
    "one rank, recomputed, a large head": {
        "world": 1,
        "vocab": 32000,
        "length": 512,
        "config": {
            "hidden_size": 1280,
            "intermediate_size": 3456,
            "num_hidden_layers": 12,
            "num_attention_heads": 20,
            "num_key_value_heads": 20,
            "tie_word_embeddings": False,
        },
        "distill": {
            "tokens_per_step": 1024,
            "micro_batch": 2,
            "zero_stage": 2,
            "activation_checkpointing": True,
        },
    },
}


def train(data: dict[str, Any], root: str) -> dict[str, Any]:
    """The metrics of the training of a spec; on every rank."""
    from trainer.run_task import run_task

    worker = start()
    from transformers import AutoModelForCausalLM  # noqa: F401 - before the memory is looked at
    from transformers.models.llama import modeling_llama  # noqa: F401

    from cluster.storage import open_store
    from jobs.spec.load import spec_of
    from trainer.resolve_auto import resolve
    from trainer.tasks import make_trainings

    store = open_store(root)
    (job,) = make_trainings(resolve(spec_of(data)), {}, store, store.sub("corpus"), None)
    return run_task(job, worker)


@pytest.mark.parametrize("name", CASES)
def test_a_training_takes_what_was_foretold(name, tmp_path) -> None:
    case = CASES[name]
    spec = make_spec(case, tmp_path)
    foretold = forecast(case, spec)
    ranks = Ranks(train, spec, str(tmp_path), world=case["world"], fresh=True)
    try:
        metrics = ranks.results(timeout=400)[0]
    finally:
        shutil.rmtree(tmp_path)  # gigabytes of student
    assert metrics["parameters"] == foretold["parameters"] >= 300_000_000
    told = {part: round(size / 1e6) for part, size in foretold["parts"].items()}
    print(f"{name}: {metrics['peak_bytes'] / 1e6:.0f} MB, foretold {told}")
    assert foretold["total"] == pytest.approx(metrics["peak_bytes"], rel=0.15)


def make_spec(case: dict[str, Any], root: Path) -> dict[str, Any]:
    """Plain training of random weights; its corpus is made in `root`."""
    from cluster.storage import open_store
    from jobs.spec.load import spec_of
    from trainer.corpus.tokenizer import load_tokenizer, train_tokenizer

    train_tokenizer([" ".join(WORDS)], 320, root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    tokenizer.add_tokens([f"<{number}>" for number in range(case["vocab"] - len(tokenizer))])
    spec = {
        "name": "plain",
        "storage": str(root),
        "student": {"init": "random", "config": {"model_type": "llama", **case["config"]}},
        "tokenizer": {"train": case["vocab"]},
        "data": {
            "train": [{"source": write_texts(root / "texts", documents=1500)}],
            "sequence_length": case["length"],
            "select_sequences": 4,
            "report_sequences": 2,
        },
        "distill": {
            "losses": {"ce": 1.0},
            "steps": 2,
            "evaluate_steps": None,
            "activation_checkpointing": False,
            **case["distill"],
        },
        "sweep": None,
    }
    make_corpus(open_store(root).sub("corpus"), spec_of(spec).data, tokenizer)
    return spec


def forecast(case: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """What a plan says of one worker."""
    from jobs.forecast.forecast import forecast
    from jobs.forecast.place import cluster_place
    from jobs.spec.load import spec_of

    place = cluster_place([(case["world"], 0)], None, 1e12)
    found = forecast(spec_of({**spec, "resources": {"distill": {"workers": case["world"]}}}), place)
    memory = found["stages"]["distill"]["memory"]
    return {
        "total": memory["total"],
        "parts": memory["device"],
        "parameters": found["models"]["student"]["parameters"],
    }
