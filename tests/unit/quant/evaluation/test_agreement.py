from __future__ import annotations

import pytest
import torch

from quant.evaluation.cell import kernel_kl
from quant.kernels import use_kernels
from quant.layers.linear import quant_linears
from quant.quant_spec import QuantSpec
from quant.quantize import quantize


def test_the_plain_kernel_agrees_with_itself(make_llama):
    model = quantize(make_llama(), QuantSpec(4, 32))
    use_kernels(model, "plain")
    assert kernel_kl(model) == 0


def test_a_kernel_that_answers_otherwise_is_told_by_its_kl(make_llama):
    """Against the definition, over full passes: a layer that doubles its output while chosen."""
    model = quantize(make_llama(), QuantSpec(4, 32), dtype=torch.float32)
    use_kernels(model, "plain")
    layer = next(iter(quant_linears(model).values()))
    ids = torch.randint(256, (1, 32), generator=torch.Generator().manual_seed(1))
    plain = model(input_ids=ids).logits[0, 7:].double().log_softmax(-1)
    calls = 0

    def double(_, args, output):
        nonlocal calls
        calls += 1
        return 2 * output if calls <= 25 else output  # a prompt and 24 single ids

    handle = layer.register_forward_hook(double)
    found = kernel_kl(model)
    handle.remove()
    assert calls == 50
    layer.register_forward_hook(lambda _, args, output: 2 * output)
    other = model(input_ids=ids).logits[0, 7:].double().log_softmax(-1)
    expected = float((plain.exp() * (plain - other)).sum(-1).mean())
    assert expected > 0.01
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_model_of_few_positions_is_asked_fewer(make_llama):
    model = quantize(make_llama(max_position_embeddings=16), QuantSpec(4, 32))
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert kernel_kl(model) >= 0
    assert sum(lengths) == 2 * 16
