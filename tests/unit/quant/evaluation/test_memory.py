"""What a cell takes, foretold and as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from quant.evaluation.baselines import evaluate_model
from quant.evaluation.measure import EvaluationData
from quant.evaluation.memory import PROCESS, cell_memory
from quant.quant_spec import QuantSpec
from tests.unit.quant.conftest import Batch

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
LENGTH = 16
RUN = """
import json, sys
from quant.evaluation.cell import run_cell
from quant.grid import uniform
from quant.quant_spec import QuantSpec
from tests.unit.quant.evaluation.test_memory import part
found = run_cell(uniform(QuantSpec(4, 64)), sys.argv[1], part(sys.argv[2]))
print(json.dumps(found["eval_peak_bytes"]))
"""


def part(stored: str) -> EvaluationData:
    """Two sequences: few, for products in bfloat16 are slow on some processors."""
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, LENGTH))
    mask = np.ones((2, LENGTH), np.float32)
    mask[:, -1] = 0
    return EvaluationData(
        lambda: iter([Batch(ids, np.tile(np.arange(LENGTH), (2, 1)), mask)]), None, stored
    )


def test_the_forecast_is_near_the_peak(tmp_path, make_llama):
    """150 MB of weights; in a process of its own, as a cell's task is."""
    model, stored = str(tmp_path / "model"), str(tmp_path / "reference")
    made = make_llama(**SIZES).to(torch.bfloat16)
    made.save_pretrained(model)
    evaluate_model(model, part(stored), None, "student", references={"report": stored})
    command = [sys.executable, "-c", RUN, model, stored]
    root = Path(__file__).parents[4]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    peak = json.loads(found.splitlines()[-1])
    forecast = cell_memory(LlamaConfig(**SIZES), QuantSpec(4, 64), 2, LENGTH)
    assert 0.8 < (forecast.host + forecast.mapped) / peak < 1.25, (str(forecast), peak)
    assert peak > PROCESS + 1.5 * forecast.mapped, "the model counts, not the process alone"


def test_what_makes_a_cell_larger() -> None:
    config = LlamaConfig(**SIZES)

    def host(bits: int = 4, batch: int = 2, length: int = 128, **more: bool) -> int:
        return cell_memory(config, QuantSpec(bits, 64), batch, length, **more).host

    assert host(8) > host(4) > host(2)
    assert host(batch=64) > host() and host(length=4096) > host(length=2048)
    assert host(training=True) > host()
    few = {"model.layers.*": None, "lm_head": None}
    with pytest.raises(ValueError, match="nothing to quantize|matches no layer"):
        cell_memory(config, QuantSpec(4, 64), 1, 8, few)


def test_on_a_gpu_the_host_holds_no_weights() -> None:
    found = cell_memory(LlamaConfig(**SIZES), QuantSpec(4, 64), 2, 128, cuda=True)
    assert found.host == PROCESS and found.device > found.mapped > 0
    assert "GB (" in str(found) and "16-bit weights" in str(found)
