"""How far a forward pass is, by its layers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.fixtures.corpora import config_values
from trainer.models.load import layer_progress


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_layer_tells_and_nothing_stays_behind(kind: str) -> None:
    config = AutoConfig.for_model(**config_values(kind))
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    ids = torch.ones(1, 4, dtype=torch.int64)
    told: list[float] = []
    with layer_progress(model, told.append):
        model(input_ids=ids)
    count = config.num_hidden_layers
    assert told == [number / count for number in range(1, count + 1)]
    model(input_ids=ids)
    assert len(told) == count
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_without_layers_tells_nothing() -> None:
    told: list[float] = []
    with layer_progress(torch.nn.Linear(2, 2), told.append):
        pass
    assert not told
