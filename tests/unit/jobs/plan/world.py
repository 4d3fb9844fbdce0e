"""Specs and folders with a config alone, for tests of plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LLAMA_8B = {
    **LLAMA_70B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def folder_of(config: dict[str, Any], folder: Path) -> str:
    """A model folder that holds config.json and nothing else."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def spec_data(root: Path, **changes: Any) -> dict[str, Any]:
    """A job that distils 70 billion weights into 8; `changes` by dotted key, dots as __."""
    data: dict[str, Any] = {
        "name": "big",
        "storage": str(root / "runs"),
        "teacher": {"model": folder_of(LLAMA_70B, root / "teacher"), "sharding": "zero3"},
        "student": {"model": folder_of(LLAMA_8B, root / "student")},
        "data": {"train": [{"source": "some/texts"}], "sequence_length": 4096},
        "distill": {"steps": 1000, "tokens_per_step": 1048576, "activation_checkpointing": True},
        "sweep": {"bits": [8, 4], "group_size": [64]},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = data
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return data


def plan_of(root: Path, gpu: str = "h100", gpus: int = 16, **changes: Any) -> dict[str, Any]:
    """The plan of `spec_data` on such GPUs."""
    from jobs.plan.forecast import forecast
    from jobs.plan.place import named_place
    from jobs.schema import spec_of

    return forecast(spec_of(spec_data(root, **changes)), named_place(gpu, gpus, None), 2.0)
