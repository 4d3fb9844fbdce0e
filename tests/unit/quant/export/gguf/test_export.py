"""Whole GGUF files, read back with the gguf package and with transformers' own reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from gguf.quants import dequantize
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quant.codes import Codes
from quant.export.gguf import export as exporting
from quant.export.gguf.export import export_gguf, model_name
from quant.layers.linear import QuantEmbedding, QuantLinear, QuantWeight
from tests.fixtures import gguf_models

SIZES = {
    "vocab_size": 400,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LAYER = {  # of the file -> of the model
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
NORMS = {"attn_q_norm.weight": "self_attn.q_norm.weight"}
NORMS |= {"attn_k_norm.weight": "self_attn.k_norm.weight"}
BIASES = {f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}
BIASES |= {"attn_output.bias": "self_attn.o_proj.bias"}
BIASES |= {f"ffn_{part}.bias": f"mlp.{part}_proj.bias" for part in ("gate", "up", "down")}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder of a byte-level tokenizer of 400 entries."""
    return gguf_models.byte_level(tmp_path_factory.mktemp("tokenizer") / "student")


def make(config, dtype=torch.float32):
    torch.manual_seed(0)
    kind = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}[config.model_type]
    model = kind(config).eval().requires_grad_(False).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def llama(tied=False, **changes):
    return make(LlamaConfig(**SIZES, tie_word_embeddings=tied, **changes))


def random_codes(shape, bits, group) -> Codes:
    rows, columns = shape
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, columns // group) * 0.02 + 1e-4).half()
    zero = (torch.rand(rows, columns // group) * (2**bits - 1)).half()
    return Codes(codes, scale, zero, bits)


def put_codes(model, bits, group, only=""):
    """Random codes in the place of every linear layer but the head; group None: the whole row."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and only in name and name != "lm_head":
            size = group or module.in_features
            codes = random_codes(module.weight.shape, bits, size)
            model.set_submodule(name, QuantLinear.from_codes(codes, module.bias))
    return model


def named(model) -> dict[str, str]:
    """Names of the file -> of the model, written out by hand."""
    per_layer = dict(LAYER)
    per_layer |= NORMS if model.config.model_type == "qwen3" else {}
    per_layer |= BIASES if getattr(model.config, "attention_bias", False) else {}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm"}
    names["output_norm.weight"] += ".weight"
    if not model.config.tie_word_embeddings:
        names["output.weight"] = "lm_head.weight"
    for layer in range(model.config.num_hidden_layers):
        names |= {f"blk.{layer}.{k}": f"model.layers.{layer}.{v}" for k, v in per_layer.items()}
    return names


def dense(model, name: str) -> torch.Tensor:
    """A weight in float64, rows in the order of the file."""
    module = model.get_submodule(name.rpartition(".")[0])
    quantized = isinstance(module, QuantWeight) and name.endswith("weight")
    weight = module.dequantize(torch.float32) if quantized else model.get_parameter(name)
    weight = weight.double()
    part = name.split(".")[-2]
    if model.config.model_type != "llama" or part not in ("q_proj", "k_proj"):
        return weight
    half = model.config.head_dim // 2
    order = [  # neighbours 2i and 2i + 1 of the file are i and i + half of a head
        head + part * half + i
        for head in range(0, len(weight), 2 * half)
        for i in range(half)
        for part in range(2)
    ]
    return weight[order]


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str], dict]:
    reader = GGUFReader(path)
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    values = {
        t.name: dequantize(np.ascontiguousarray(t.data), t.tensor_type).reshape(shapes[t.name])
        for t in reader.tensors
    }
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    return values, types, {name: field.contents() for name, field in reader.fields.items()}


def check(model, path: Path, report) -> dict:
    """Every tensor of the file against the model, within what its type may cost."""
    values, types, fields = read(path)
    names = named(model)
    assert set(values) == set(names) == set(report.tensors)
    assert types == report.tensors
    for name, value in values.items():
        expected = dense(model, names[name]).numpy()
        assert value.shape == expected.shape, name
        module = model.get_submodule(names[name].rpartition(".")[0])
        kind = types[name]
        if kind in ("Q4_1", "Q5_1"):
            codes = module.unpacked()
            offset = (codes.zero.double() * codes.scale.double()).abs().max()
            assert np.abs(value - expected).max() <= float(offset) * 2**-11 + 2**-24, name
        elif kind == "Q8_0":
            assert np.linalg.norm(value - expected) < 0.012 * np.linalg.norm(expected), name
        else:
            rtol = {"F32": 1e-7, "F16": 2**-11, "BF16": 2**-8}[kind]
            np.testing.assert_allclose(value, expected, rtol=rtol, atol=2**-25, err_msg=name)
        lost = np.linalg.norm(value - expected) / np.linalg.norm(expected)
        assert report.error.get(name, 0.0) == pytest.approx(lost, rel=1e-2, abs=1e-7), name
    assert report.files == {path.name: path.stat().st_size}
    assert report.bytes == path.stat().st_size
    return fields


@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1])
def test_every_tensor_of_a_quantized_model(place, tmp_path, bits, group):
    model = put_codes(llama(tied=True), bits, group)
    path = tmp_path / "model.gguf"
    report = export_gguf(model, place, path)
    check(model, path, report)
    kind = "Q4_1" if bits <= 4 else "Q5_1" if bits == 5 else "Q8_0"
    assert report.tensors["blk.1.ffn_down.weight"] == kind
    assert report.tensors["token_embd.weight"] == "F16"
    assert report.tensors["blk.1.ffn_norm.weight"] == "F32"
    assert report.format == f"gguf {kind} + F16"
    assert any(f"{bits}-bit codes" in note for note in report.notes) == (bits in (8, 6, 3, 2, 1))


@pytest.mark.parametrize("group", [8, 16])
def test_groups_of_no_whole_block(place, tmp_path, group):
    model = put_codes(llama(), 4, group)
    report = export_gguf(model, place, tmp_path / "model.gguf")
    check(model, tmp_path / "model.gguf", report)
    assert report.tensors["blk.0.attn_q.weight"] == "Q8_0"
    assert any(f"groups of {group}" in note for note in report.notes)


@pytest.mark.parametrize("kind,stored", [("f32", "F32"), ("f16", "F16"), ("q8_0", "Q8_0")])
@pytest.mark.parametrize("quantized", [False, True])
def test_every_matrix_as_asked(place, tmp_path, kind, stored, quantized):
    model = put_codes(llama(), 4, 64) if quantized else llama()
    report = export_gguf(model, place, tmp_path / "model.gguf", kind)
    fields = check(model, tmp_path / "model.gguf", report)
    matrices = {kind for name, kind in report.tensors.items() if "norm" not in name}
    assert matrices == {stored} and report.format == f"gguf {stored}"
    told = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}[stored]
    assert LlamaFileType(fields["general.file_type"]).name == told


def test_qwen3_keeps_its_order_and_norms(place, tmp_path):
    config = Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True)
    model = put_codes(make(config, torch.bfloat16), 4, 64)
    report = export_gguf(model, place, tmp_path / "model.gguf")
    fields = check(model, tmp_path / "model.gguf", report)
    assert fields["general.architecture"] == "qwen3"
    assert fields["qwen3.attention.key_length"] == 64
    assert report.tensors["blk.0.attn_q_norm.weight"] == "F32"


def test_biases_move_with_their_rows(place, tmp_path):
    model = put_codes(llama(attention_bias=True, mlp_bias=True), 5, 32, only="q_proj")
    report = export_gguf(model, place, tmp_path / "model.gguf")
    check(model, tmp_path / "model.gguf", report)
    assert report.tensors["blk.0.attn_q.bias"] == "F32"


def test_mixed_bits_keep_each_their_type(place, tmp_path):
    model = put_codes(llama(), 4, 64, only="self_attn")
    model = put_codes(model, 5, 32, only="layers.0.mlp")
    model = put_codes(model, 8, 64, only="layers.1.mlp.up")
    report = export_gguf(model, place, tmp_path / "model.gguf")
    check(model, tmp_path / "model.gguf", report)
    kinds = [report.tensors[f"blk.{n}"] for n in ("0.attn_k.weight", "0.ffn_up.weight")]
    kinds += [report.tensors[f"blk.1.ffn_{part}.weight"] for part in ("up", "down")]
    assert kinds == ["Q4_1", "Q5_1", "Q8_0", "F16"]


def test_quantized_embeddings_and_a_head_of_its_own(place, tmp_path):
    model = llama()
    table = QuantEmbedding.from_codes(random_codes((400, 128), 4, 64))
    model.set_input_embeddings(table)
    model.lm_head = QuantLinear.from_codes(random_codes((400, 128), 5, 64))
    report = export_gguf(model, place, tmp_path / "model.gguf")
    check(model, tmp_path / "model.gguf", report)
    assert report.tensors["token_embd.weight"] == "Q4_1"
    assert report.tensors["output.weight"] == "Q5_1"


def test_a_tied_quantized_head_is_written_once(place, tmp_path):
    model = llama(tied=True)
    table = QuantEmbedding.from_codes(random_codes((400, 128), 4, 64))
    model.set_input_embeddings(table)
    model.lm_head = QuantLinear.share(table)
    report = export_gguf(put_codes(model, 4, 64), place, tmp_path / "model.gguf")
    check(model, tmp_path / "model.gguf", report)
    assert report.tensors["token_embd.weight"] == "Q4_1" and "output.weight" not in report.tensors
    assert report.format == "gguf Q4_1"


def test_metadata(place, tmp_path):
    model = put_codes(llama(), 4, 64)
    report = export_gguf(model, place, tmp_path / "model.gguf")
    _, _, fields = read(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "student",
        "general.quantization_version": 2,
        "llama.vocab_size": 400,
        "llama.context_length": 256,
        "llama.embedding_length": 128,
        "llama.block_count": 2,
        "llama.feed_forward_length": 192,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    matrices = [(t, n) for t, n in report.tensors.items() if n == "Q4_1"]
    assert len(matrices) == 14 and LlamaFileType(fields["general.file_type"]).name == "MOSTLY_Q4_1"
    weights = sum(p.numel() for p in llama().parameters())
    bits = 8 * (tmp_path / "model.gguf").stat().st_size / weights
    assert f"{bits:.2f} bits per weight" in report.notes[0]


def test_llama_3_rope_scaling_becomes_factors(place, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = llama(rope_parameters=rope)
    export_gguf(model, place, tmp_path / "model.gguf")
    values, types, fields = read(tmp_path / "model.gguf")
    # arXiv 2407.21783's rule, as published with the weights
    wavelength = 2 * np.pi * 5e5 ** (np.arange(0, 32, 2) / 32)
    smooth = (64 / wavelength - 1) / (4 - 1)
    blended = 1 / ((1 - smooth) / 8 + smooth)
    expected = np.where(wavelength < 16, 1, np.where(wavelength > 64, 8, blended))
    np.testing.assert_allclose(values["rope_freqs.weight"], expected, rtol=1e-5)
    assert types["rope_freqs.weight"] == "F32" and fields["llama.rope.freq_base"] == 5e5


def test_other_rope_scaling_becomes_keys(place, tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    export_gguf(llama(rope_parameters=rope), place, tmp_path / "model.gguf")
    _, _, fields = read(tmp_path / "model.gguf")
    found = [fields[f"llama.rope.scaling.{k}"] for k in ("type", "factor")]
    assert [*found, fields["llama.rope.scaling.original_context_length"]] == ["yarn", 4.0, 64]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_transformers_reads_the_same_model(place, tmp_path, kind):
    config = LlamaConfig(**SIZES) if kind == "llama" else Qwen3Config(**SIZES, head_dim=128)
    model = put_codes(make(config), 4, 64)
    report = export_gguf(model, place, tmp_path / "model.gguf", "f32")
    assert not report.error
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    ids = torch.arange(60).view(2, 30) * 6
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_weights_beyond_float16_are_not_made_infinite(place, tmp_path):
    model = llama().to(torch.bfloat16)
    model.lm_head.weight[0, 0] = 1e6
    report = export_gguf(model, place, tmp_path / "model.gguf")
    check(model, tmp_path / "model.gguf", report)
    assert report.tensors["output.weight"] == "BF16"
    assert any("F16 cannot hold" in note for note in report.notes)


def test_a_folder_gets_a_file_of_the_name(place, tmp_path):
    report = export_gguf(llama(), place, tmp_path / "new" / "folder", "q8_0")
    assert list(report.files) == ["student.gguf"]
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["student.gguf"]


def test_the_name_of_a_model(place, tmp_path):
    hub = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c1899de"
    assert model_name(hub) == "Qwen3-0.6B"
    assert model_name(tmp_path / "demo" / "cells" / "hqq-4b-g64" / "model") == "demo-hqq-4b-g64"
    assert model_name(tmp_path / "mine" / "model") == "mine"
    assert model_name(tmp_path / "mine") == "mine"
    for name, expected in ((None, "student"), ("demo-4b", "demo-4b")):
        export_gguf(llama(), place, tmp_path / "out", "q8_0", name)
        fields = read(tmp_path / "out" / f"{expected}.gguf")[2]
        assert fields["general.name"] == expected


def test_a_file_appears_whole_or_not_at_all(place, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"what was there")
    made = exporting.encode
    calls = []

    def fails(weight, kind):
        calls.append(kind)
        if len(calls) == 5:
            raise OSError("no space left on device")
        return made(weight, kind)

    monkeypatch.setattr(exporting, "encode", fails)
    with pytest.raises(OSError, match="no space"):
        export_gguf(llama(), place, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == b"what was there"


def mistral():
    return MistralForCausalLM(MistralConfig(**SIZES))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=400))


def qwen3_with_output_bias():
    return make(Qwen3Config(**SIZES, attention_bias=True))


def sliding():
    layers = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    return make(Qwen3Config(**SIZES, **layers))


def not_finite():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    return model


def codes_not_finite():
    model = put_codes(llama(), 4, 64)
    model.model.layers[1].mlp.up_proj.scale[3, 0] = float("inf")
    return model


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.5}
REFUSED = {
    "model_type 'gpt2'.*LlamaForCausalLM, Qwen3ForCausalLM": gpt2,
    "model_type 'mistral'": mistral,
    "o_proj.bias.*no place": qwen3_with_output_bias,
    "layer_types": sliding,
    "layers.1.mlp.up_proj.weight holds values that are not finite": not_finite,
    "up_proj.weight: its scales hold values that are not finite": codes_not_finite,
    "rope_type 'dynamic'.*may be 'default'": lambda: llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "attention_factor of rope_type 'yarn' is 1.5": lambda: llama(rope_parameters=YARN),
    "hidden_act 'gelu'": lambda: llama(hidden_act="gelu"),
}


@pytest.mark.parametrize("match", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(place, tmp_path, match):
    with pytest.raises(ValueError, match=match) as error:
        export_gguf(REFUSED[match](), place, tmp_path / "model.gguf")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked(place, tmp_path):
    with pytest.raises(ValueError, match="kind 'q4_0' is unknown; may be auto, f32, f16, q8_0"):
        export_gguf(llama(), place, tmp_path / "model.gguf", "q4_0")  # type: ignore[arg-type]
    (tmp_path / "model.gguf").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        export_gguf(llama(), place, tmp_path / "model.gguf")
