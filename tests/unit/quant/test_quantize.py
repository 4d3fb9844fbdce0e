from __future__ import annotations

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from quant.linear import QuantLinear, quant_linears
from quant.methods import quantize_weight
from quant.quantize import check_group_size, quantizable_linears, quantize
from quant.spec import QuantSpec


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1])
def test_codes_and_weights_are_hqqs_own(bits):
    torch.manual_seed(bits)
    linear = nn.Linear(128, 96)
    made = quantize_weight(linear.weight, bits, 64)
    ours = QuantLinear.from_codes(made, linear.bias)
    theirs = HQQLinear(
        linear,
        BaseQuantizeConfig(nbits=bits, group_size=64, axis=1),
        del_orig=False,
        compute_dtype=torch.float16,
        device="cpu",
    )
    weight = theirs.dequantize().float()
    # hqq dequantizes in float16 arithmetic: two roundings of 2^-11 of values up to |q - z| s.
    atol = float((made.scale * (1 << bits)).max()) * 2**-10
    torch.testing.assert_close(ours.dequantize(), weight, rtol=2**-9, atol=atol)
    assert torch.equal(made.scale.flatten(), theirs.meta["scale"].flatten().half())
    assert torch.equal(made.zero.flatten(), theirs.meta["zero"].flatten().half())


def test_row_chunks_are_quantized_alone_and_keep_their_rows():
    torch.manual_seed(0)
    weight = torch.randn(300, 64) * torch.linspace(0.1, 3, 300)[:, None]
    made = quantize_weight(weight, 4, 32)
    last = quantize_weight(weight[256:], 4, 32)
    for whole, part in zip(
        (made.codes, made.scale, made.zero), (last.codes, last.scale, last.zero), strict=True
    ):
        assert torch.equal(whole[256:], part)
    layer = QuantLinear.from_codes(made)
    error = (layer.dequantize() - weight).abs().amax(1) / weight.abs().amax(1)
    assert error.max() < 0.15


def test_constant_and_zero_groups_stay_what_they_are():
    weight = torch.zeros(4, 32)
    weight[1] = 0.5
    weight[2, :16] = -2.0
    layer = QuantLinear.from_codes(quantize_weight(weight, 4, 16))
    torch.testing.assert_close(layer.dequantize(), weight, rtol=1e-3, atol=1e-6)


def test_a_zero_point_beyond_float16_is_an_error_not_a_nan(make_llama):
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight[:] = 50.0 + torch.rand(128, 64) * 1e-3
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj.*beyond float16"):
        quantize(model, QuantSpec(8, 32))


@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_but_the_head(make_llama, tied):
    model = make_llama(tied=tied)
    names = set(quantizable_linears(model))
    assert len(names) == 14 and "lm_head" not in names
    embedding = model.model.embed_tokens.weight.clone()
    assert quantize(model, QuantSpec(4, 32)) is model
    assert set(quant_linears(model)) == names
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.model.embed_tokens.weight, embedding.bfloat16())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_biases_are_kept(make_llama):
    model = make_llama(attention_bias=True)
    bias = model.model.layers[0].self_attn.q_proj.bias
    bias.copy_(torch.randn(64))
    quantize(model, QuantSpec(4, 32), dtype=torch.float32)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, bias)


def test_group_sizes_are_checked_from_a_config_without_weights():
    # 80 billion weights: only possible on the meta device
    big = LlamaConfig(
        hidden_size=8192, intermediate_size=28000, num_hidden_layers=80, num_attention_heads=64
    )
    check_group_size(big, [8, 32])
    with pytest.raises(ValueError) as caught:
        check_group_size(big, [32, 64])
    line = str(caught.value)
    assert "\n" not in line
    assert "group_size 64" in line and "layers.0.mlp.down_proj" in line and "28000" in line
    assert line.endswith("may be 8, 16, 32")


def test_a_width_that_cannot_be_packed_is_named():
    odd = LlamaConfig(
        hidden_size=64, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(ValueError, match=r"down_proj is 100 weights wide.*no group size does"):
        check_group_size(odd, [4])


def test_refusals(make_llama):
    with pytest.raises(ValueError, match="7 bits are not offered"):
        quantize(make_llama(), QuantSpec(7, 32))
    with pytest.raises(ValueError, match="'gptq' is unknown; may be hqq"):
        quantize(make_llama(), QuantSpec(4, 32, "gptq"))
    with pytest.raises(ValueError, match="group_size 48 does not do"):
        quantize(make_llama(), QuantSpec(4, 48))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no torch.nn.Linear"):
        quantize(gpt2, QuantSpec(4, 32))
