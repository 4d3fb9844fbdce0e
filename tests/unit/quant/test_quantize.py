"""`quantize`: whole models of several families, against stock models whose weights are replaced."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quant.artifact.load import load_quantized
from quant.layers.linear import QuantEmbedding, QuantLinear, quant_linears, quant_weights
from quant.methods import quantize_weight
from quant.quant_spec import CHANNEL, QuantSpec
from quant.quantize import quantize, stored_dtype
from tests.fixtures.model_families import tiny

IDS = torch.arange(40).view(2, 20) * 37 % 256
BOTH = QuantSpec(4, 32, "rtn", embeddings=True, head=True)


def replaced(model: PreTrainedModel, bits: int, size: int | str, names: set[str] | None = None):
    """A copy of the stock model, each weight of `names` (default: linear layers but the head) in
    the values that the method gives it: transformers' own layers on values that we know."""
    made = copy.deepcopy(model)
    for name, module in made.named_modules():
        plain = isinstance(module, (nn.Linear, Conv1D)) and name != "lm_head"
        if plain if names is None else name in names:
            weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
            values = quantize_weight(weight.contiguous(), bits, size, "rtn").dequantize()
            module.weight.data = values.t() if isinstance(module, Conv1D) else values
    return made


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("family", "count"), [("llama", 14), ("qwen3", 14), ("gpt2", 8)])
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, CHANNEL)])
def test_a_quantized_model_computes_with_the_methods_values(family, count, bits, size):
    model = tiny(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    truth = logits(replaced(model, bits, size))
    assert quantize(model, QuantSpec(bits, size, "rtn"), dtype=torch.float32) is model
    assert len(quant_linears(model)) == len(quant_weights(model)) == count
    torch.testing.assert_close(logits(model), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_embeddings_and_head(family):
    model = tiny(family)
    table = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    ends = replaced(model, 4, 32, {table, "lm_head"})
    truth = logits(replaced(ends, 4, 32))
    quantize(model, BOTH, dtype=torch.float32)
    torch.testing.assert_close(logits(model), truth, rtol=1e-4, atol=1e-4)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding) and isinstance(head, QuantLinear)
    kept = {id(tensor) for tensor in embedding.stored().values()}
    same = kept == {id(tensor) for tensor in head.stored().values()}
    assert same == (family != "llama") == (head.shared is embedding)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_bfloat16_model_keeps_codes_and_scales_as_they_were_made(family):
    model, wide = tiny(family), tiny(family)
    quantize(model, BOTH, dtype=torch.bfloat16)
    quantize(wide, BOTH)
    assert logits(model).dtype == torch.bfloat16
    for name, layer in quant_weights(model).items():
        for part, tensor in layer.stored().items():
            assert tensor.dtype == (torch.uint8 if part == "codes" else torch.float16)
            assert torch.equal(tensor, wide.get_submodule(name).stored()[part])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_quantized_model_can_be_cast(dtype):
    model, made = quantize(tiny("qwen3"), BOTH), quantize(tiny("qwen3"), BOTH, dtype=dtype)
    model.to(dtype)
    assert model.model.embed_tokens(IDS).dtype == logits(model).dtype == dtype
    assert torch.equal(model.model.embed_tokens(IDS), made.model.embed_tokens(IDS))


def test_a_tied_head_with_a_bias_keeps_it():
    model = tiny("qwen3")
    model.lm_head.bias = nn.Parameter(torch.randn(256), requires_grad=False)
    ends = replaced(model, 4, 32, {"model.embed_tokens"})
    ends.lm_head.weight = ends.model.embed_tokens.weight
    truth = logits(replaced(ends, 4, 32))
    quantize(model, BOTH, dtype=torch.float32)
    torch.testing.assert_close(logits(model), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_all_else_is_cast_and_stays_tied(make_llama, tied):
    model = make_llama(tied=tied)
    embedding = model.model.embed_tokens.weight.clone()
    quantize(model, QuantSpec(4, 32), dtype=torch.bfloat16)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.model.embed_tokens.weight, embedding.bfloat16())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_keeps_its_own_dtype(make_llama, dtype):
    model = make_llama().to(dtype)
    embedding = model.model.embed_tokens.weight.clone()
    quantize(model, QuantSpec(4, 32))
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.dtype == model.config.dtype == logits(model).dtype == dtype
    assert stored_dtype(model) == (torch.bfloat16 if dtype is torch.float32 else dtype)


def test_biases_are_kept(make_llama):
    model = make_llama(attention_bias=True)
    bias = model.model.layers[0].self_attn.q_proj.bias
    bias.copy_(torch.randn(64))
    quantize(model, QuantSpec(4, 32), dtype=torch.float32)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, bias)


def test_mixed_bits_groups_and_methods():
    model = tiny("llama")
    layers = {"*.down_proj": QuantSpec(8, CHANNEL), "*.layers.1.mlp": None}
    layers["*.k_proj"] = QuantSpec(2, 16, "hqq")
    # The first entry that matches counts: both down_proj get 8 bits.
    quantize(model, QuantSpec(4, 32, "rtn"), layers)
    found = {
        name: (layer.bits, layer.group_size, layer.method)
        for name, layer in quant_weights(model).items()
    }
    assert found["model.layers.1.mlp.down_proj"] == (8, 128, "hqq")
    assert found["model.layers.0.self_attn.k_proj"] == (2, 16, "hqq")
    assert found["model.layers.1.self_attn.q_proj"] == (4, 32, "rtn")
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear and len(found) == 12


def test_int8_dynamic_layers_quantize_their_inputs_too():
    model, plain = tiny("llama"), tiny("llama")
    quantize(model, QuantSpec(8, CHANNEL, "int8-dynamic", head=True), dtype=torch.float32)
    assert {layer.activations for layer in quant_linears(model).values()} == {"int8"}
    x = torch.randn(5, 64)
    layer, name = model.lm_head, "lm_head"
    step = x.abs().amax(1, keepdim=True) / 127
    weight = quantize_weight(plain.get_submodule(name).weight, 8, CHANNEL, "int8-dynamic")
    truth = (torch.round(x / step) * step) @ weight.dequantize().T
    torch.testing.assert_close(layer(x), truth, rtol=1e-3, atol=1e-3)


def test_a_tied_head_quantizes_its_inputs_before_and_after_saving(tmp_path):
    model, plain = tiny("qwen3"), tiny("qwen3")
    spec = QuantSpec(8, CHANNEL, "int8-dynamic", embeddings=True, head=True)
    quantize(model, spec, dtype=torch.float32)
    assert model.lm_head.shared is model.model.embed_tokens
    model.save_pretrained(tmp_path)
    again = load_quantized(tmp_path, prefer="plain")
    assert again.lm_head.shared is again.model.embed_tokens
    assert model.lm_head.activations == again.lm_head.activations == "int8"
    x = torch.randn(5, 64)
    step = x.abs().amax(1, keepdim=True) / 127
    weight = quantize_weight(plain.lm_head.weight, 8, CHANNEL, "int8-dynamic").dequantize()
    truth = (torch.round(x / step) * step) @ weight.T
    torch.testing.assert_close(model.lm_head(x), truth, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_are_listed_stay_and_the_model_answers(family):
    model = tiny(family)
    linears = {n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    truth = logits(replaced(model, 4, 32, linears))
    quantize(model, QuantSpec(4, 32, "rtn"), {"*.experts*": None}, torch.float32)
    assert set(quant_linears(model)) == linears
    torch.testing.assert_close(logits(model), truth, rtol=1e-4, atol=1e-4)


def test_a_module_under_two_names_stays_one():
    model = tiny("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    truth = logits(replaced(model, 4, 32))
    quantize(model, QuantSpec(4, 32, "rtn"), dtype=torch.float32)
    first, second = model.model.layers
    assert first.mlp.up_proj is second.mlp.up_proj
    assert first.self_attn.q_proj is second.self_attn.q_proj
    torch.testing.assert_close(logits(model), truth, rtol=1e-4, atol=1e-4)


# -- in place, layer by layer ------------------------------------------------------------------


def test_each_weight_is_freed_before_the_next_is_quantized():
    model = tiny("qwen3")
    refs = [weakref.ref(m.weight) for n, m in model.named_modules() if n.endswith("_proj")]
    refs.append(weakref.ref(model.lm_head.weight))
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total, sum(ref() is not None for ref in refs)))

    quantize(model, BOTH, progress=progress)
    assert [alive for *_, alive in seen] == list(range(14, -1, -1))
    sizes = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) + 256 * 64
    assert seen[-1][:2] == (sizes, sizes)
    assert [done for done, *_ in seen] == sorted({done for done, *_ in seen})


@pytest.mark.parametrize(
    ("spec", "layers", "words"),
    [
        (QuantSpec(4, 48), None, "group_size 48 does not do"),
        (QuantSpec(4, 32), {"*.down_proj": QuantSpec(4, 256)}, "group_size 256 does not do"),
        (QuantSpec(4, 32), {"nothing": None}, "matches no layer"),
        (4, None, "spec is 4; may be a QuantSpec"),
    ],
)
def test_a_refused_spec_leaves_the_model_as_it_was(make_llama, spec, layers, words):
    model = make_llama()
    before = state(model)
    with pytest.raises(ValueError, match=words) as caught:
        quantize(model, spec, layers)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert model.dtype == torch.float32 and not hasattr(model, "quant_spec")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_the_model_as_it_was(make_llama, bad):
    model = make_llama()
    model.model.layers[1].mlp.down_proj.weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj has weights that are not"):
        quantize(model, QuantSpec(4, 32))
    assert not quant_weights(model)


def test_what_is_no_whole_16_bit_model_is_refused(make_llama):
    model = make_llama()
    with pytest.raises(ValueError, match="dtype is torch.int8; may be torch.bfloat16"):
        quantize(model, QuantSpec(4, 32), dtype=torch.int8)
    with pytest.raises(ValueError, match="model is a Linear; may be a transformers"):
        quantize(nn.Linear(64, 64), QuantSpec(4, 32))
    with pytest.raises(ValueError, match="q_proj is on the meta device"):
        quantize(tiny("llama", "meta"), QuantSpec(4, 32))
    quantize(model, QuantSpec(4, 32))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is quantized already \(hqq-4b-g32\)"):
        quantize(model, QuantSpec(8, 32))
    foreign = make_llama()
    foreign.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantized already; load"):
        quantize(foreign, QuantSpec(4, 32))


def test_a_zero_point_beyond_float16_is_an_error_with_the_layers_name(make_llama):
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight[:] = 50.0 + torch.rand(128, 64) * 1e-3
    words = r"layer model\.layers\.1\.mlp\.up_proj: .*beyond float16.*load the model again$"
    with pytest.raises(RuntimeError, match=words):
        quantize(model, QuantSpec(8, 32))
