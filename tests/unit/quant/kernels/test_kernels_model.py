"""Whole models on kernels: generation with both caches, compilation, memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from quant.kernels import kernel_names, native, use_kernels
from quant.layers.linear import QuantEmbedding, QuantLinear, dense_weights, quant_linears
from quant.methods import quantize_weight
from tests.fixtures.kernel_layers import random_codes, random_input

# What logits may be off by, in standard deviations, of a choice between tokens and of all: with
# torch's own kernels, and with the C++ op, which rounds activations to int8.
LIMITS = {"torch": (0.05, 0.05), "op": (0.15, 0.1)}


@pytest.fixture(params=LIMITS)
def limits(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "unavailable", lambda: "no op here")
    return LIMITS[request.param]


def quantized(model, bits=4, group=32, tied=False):
    """Every linear layer as codes, and the same model with those codes' dense weights."""
    dense = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not (tied and name == "lm_head"):
            codes = quantize_weight(module.weight.float(), bits, group, "rtn")
            model.set_submodule(name, QuantLinear.from_codes(codes))
            weight = codes.dequantize(module.weight.dtype)
            dense.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    if tied:
        codes = quantize_weight(model.model.embed_tokens.weight.float(), bits, group, "rtn")
        embedding = QuantEmbedding.from_codes(codes, model.dtype)
        model.model.embed_tokens, model.lm_head = embedding, QuantLinear.share(embedding)
        weight = nn.Parameter(codes.dequantize(model.dtype), requires_grad=False)
        dense.model.embed_tokens.weight = dense.lm_head.weight = weight
    return model, dense


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_what_the_dense_weights_do(make_llama, bits, tied, cache, limits):
    model, dense = quantized(make_llama(tied=tied, scale=8.0).float(), bits, tied=tied)
    described = use_kernels(model)
    assert len(described) == len(quant_linears(model)) == 15
    assert not [name for name, kernel in described.items() if kernel.startswith("plain")]
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if cache == "static":
        settings["cache_implementation"] = "static"
    for rows, tokens in ((1, 9), (1, 70), (3, 5)):
        ids = torch.randint(1, 256, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, **settings}
        found, expected = model.generate(ids, **given), dense.generate(ids, **given)
        # Whatever differs may only be a choice between tokens of nearly the same score.
        for row, other in zip(found, expected, strict=True):
            differs = (row != other).nonzero().flatten()
            if len(differs):
                at = int(differs[0])
                scores = dense(row[:at].unsqueeze(0)).logits[0, -1]
                gap = (scores.max() - scores[row[at]]) / scores.std()
                assert gap < limits[0], (tokens, at, float(gap))


def test_dense_weights_are_the_plain_paths(make_llama, batches, limits):
    model, dense = quantized(make_llama().float())
    use_kernels(model)
    ids = torch.from_numpy(batches[0].input_ids[:1])  # few rows, which kernels take
    expected = dense(ids).logits
    names = kernel_names(model)
    with dense_weights(model, torch.float32):
        torch.testing.assert_close(model(ids).logits, expected)
        assert kernel_names(model) == names
    assert all(layer.dense is None for layer in quant_linears(model).values())
    with torch.inference_mode():
        np.testing.assert_allclose(
            model(ids).logits, expected, atol=limits[1] * float(expected.std())
        )


@pytest.mark.parametrize("rows", [1, 60])
@pytest.mark.parametrize(("bits", "activations"), [(4, None), (8, None), (8, "int8")])
def test_compiles_without_a_break(bits, activations, rows):
    group = 256 if activations else 64
    codes = random_codes(bits, group, whole=activations is not None)
    layer = QuantLinear.from_codes(codes, activations=activations)
    x = random_input(rows, 256)
    for prefer in ("speed", "plain"):
        use_kernels(layer, prefer)
        expected = layer(x)
        torch._dynamo.reset()
        fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(fast(x), expected, rtol=0.02, atol=0.02)
