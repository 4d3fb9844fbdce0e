"""What `export_hf` refuses, in one line, and that nothing half-written is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
)

from quant.codes import Codes
from quant.export.hf import folder as hf_folder
from quant.export.hf.candidates import candidates, portable_plan
from quant.export.hf.export import export_hf
from quant.export.hf.trial import Reference, importance, put, stock_model
from quant.layers.linear import QuantLinear
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from tests.unit.quant.export.hf.test_compressed_tensors import random_codes

IDS = torch.zeros(1, 4, dtype=torch.int64)
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64}


def quantized(config: Any, group: int = 32, only: str = "proj") -> PreTrainedModel:
    """A model with random codes in every layer whose name ends with `only`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if name.endswith(only) and weight is not None and weight.dim() == 2:
            rows, columns = weight.shape if isinstance(module, torch.nn.Linear) else weight.T.shape
            codes = random_codes(4, rows, columns, group)
            held = Codes(codes.codes, codes.scale, codes.zero, 4)
            model.set_submodule(name, QuantLinear.from_codes(held))
    return model


def llama(group: int = 32) -> PreTrainedModel:
    return quantized(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SMALL), group)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


def refused(make: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_folders_that_are_in_the_way(source: Path, tmp_path: Path) -> None:
    model = llama()
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    assert refused(lambda: export_hf(model, source, full)) == (
        f"{full} is not empty; export into a new folder"
    )
    assert refused(lambda: export_hf(model, source, full / "notes.txt")) == (
        f"{full / 'notes.txt'} is a file; name a folder to export into"
    )
    assert "is no folder" in refused(lambda: export_hf(model, tmp_path / "gone", tmp_path / "out"))
    assert [path.name for path in full.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    report = export_hf(llama(), source, out)
    assert sorted(report.files) == sorted(path.name for path in out.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_interrupted_export_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_folder, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        export_hf(llama(), source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_artifact_exports_as_its_model(source: Path, tmp_path: Path) -> None:
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SMALL)
    model = quantize(AutoModelForCausalLM.from_config(config), QuantSpec(4, 32))
    model.save_pretrained(tmp_path / "artifact")
    for name, given in (("a", model), ("b", tmp_path / "artifact")):
        export_hf(given, source, tmp_path / name)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {path.name for path in (tmp_path / "b").iterdir()}
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_without_calibration_the_choice_says_so(source: Path, tmp_path: Path) -> None:
    report = export_hf(llama(), source, tmp_path / "out")
    assert report.choice == "symmetric: scales searched, from the codes"
    assert f"{report.choice}: not chosen on KL, for there was no calibration." in report.notes
    assert report.kl == {} and report.kl_to_codes is None
    assert report.error["model.layers.0.mlp.up_proj.weight_packed"] < 0.2
    only = export_hf(llama(), source, tmp_path / "exact", formats="exact")
    assert not any("not chosen" in note for note in only.notes)
    assert only.format == "compressed-tensors pack-quantized: int4 exact, groups of 32"


def test_a_source_without_tokenizer_is_noted(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    report = export_hf(llama(), source, tmp_path / "out")
    assert f"{source} has no tokenizer files: add those of the model." in report.notes


def test_groups_that_vllm_does_not_run(source: Path, tmp_path: Path) -> None:
    text = refused(lambda: export_hf(llama(group=16), source, tmp_path / "out"))
    assert text.startswith("layer model.layers.0.self_attn.q_proj has groups of 16")
    assert "128, 64, 32 or whole rows" in text and 'formats=["exact"]' in text
    assert not (tmp_path / "out").exists()


def test_wide_groups_are_cut(source: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        **{**SMALL, "hidden_size": 512, "intermediate_size": 512}, num_attention_heads=8
    )
    report = export_hf(quantized(config, group=256), source, tmp_path / "out")
    assert report.format == "compressed-tensors pack-quantized: int4 symmetric, groups of 128"
    assert "groups of 256 are stored as groups of 128" in " ".join(report.notes)


def test_models_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = AutoModelForCausalLM.from_config(LlamaConfig(num_attention_heads=4, **SMALL))
    assert refused(lambda: export_hf(plain, source, out)) == (
        "LlamaForCausalLM holds no quantized layer; quantize it first"
    )
    gpt2 = quantized(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=64), only="c_proj")
    text = refused(lambda: export_hf(gpt2, source, out))
    assert "layer transformer.h.0.attn.c_proj is a Conv1D" in text and "gguf" in text
    experts = quantized(
        MixtralConfig(num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, **SMALL)
    )
    text = refused(lambda: export_hf(experts, source, out))
    assert "experts or fused weights (model.layers.0.mlp.experts.gate_up_proj)" in text


def test_arguments_that_are_wrong(source: Path, tmp_path: Path) -> None:
    model, out = llama(), tmp_path / "out"
    for formats in (["int4"], [], ["exact", "symmetric"]):
        text = refused(lambda formats=formats: export_hf(model, source, out, formats=formats))
        assert "may be some of symmetric, asymmetric, or exact or bf16 alone" in text
    for ids in (IDS[0], IDS.int(), IDS[:0]):
        text = refused(lambda ids=ids: export_hf(model, source, out, calibration=ids))
        assert "must be torch.int64 [sequences, tokens]" in text
    text = refused(lambda: export_hf(model, source, out, calibration=IDS + 64))
    assert "ids from 64 to 64; the model's vocabulary has 0 to 63" in text
    other = AutoModelForCausalLM.from_config(
        LlamaConfig(num_attention_heads=4, **{**SMALL, "vocab_size": 32})
    )
    text = refused(lambda: export_hf(model, source, out, calibration=IDS, original=other))
    assert "is not what the model was quantized from: model.embed_tokens.weight" in text
    assert not out.exists()


@pytest.mark.parametrize("calibration", [None, IDS])
@pytest.mark.parametrize("kind", ["8-bit", "mixed"])
def test_zero_points_that_nothing_loads(
    kind: str, calibration: torch.Tensor | None, source: Path, tmp_path: Path
) -> None:
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SMALL)
    bits, layers = (8, None) if kind == "8-bit" else (4, {"*v_proj": QuantSpec(8, 32)})
    model = quantize(AutoModelForCausalLM.from_config(config), QuantSpec(bits, 32), layers)
    out = tmp_path / "out"
    text = refused(lambda: export_hf(model, source, out, calibration, ["asymmetric"]))
    assert text.startswith('formats=["asymmetric"] holds models whose layers are all 4-bit')
    assert "int8 symmetric, groups of 32" in text and 'ask for formats=["symmetric"]' in text
    assert not out.exists()


def test_every_candidate_is_told_before_it_is_measured(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    report = export_hf(
        llama(), source, tmp_path / "out", IDS, progress=lambda *seen: told.append(seen)
    )
    assert [name for *_, name in told] == list(report.kl)
    assert [number for number, *_ in told] == list(range(len(report.kl)))
    assert {total for _, total, _ in told} == {len(report.kl)}


def test_rounded_scales_of_unlike_layers_are_noted(source: Path, tmp_path: Path) -> None:
    for dtype, noted in ((torch.bfloat16, True), (torch.float16, False)):
        config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SMALL)
        model = AutoModelForCausalLM.from_config(config)
        model = quantize(model, QuantSpec(4, 32), {"*v_proj": QuantSpec(8, 32)}, dtype=dtype)
        report = export_hf(model, source, tmp_path / str(dtype), formats="exact")
        assert any("rounded to bf16" in note for note in report.notes) == noted
        assert (max(report.error.values()) > 1e-3) == noted  # float16 arithmetic costs 2e-4


def test_the_stock_model_is_not_initialised_and_shares_what_is_not_quantized() -> None:
    model = llama()
    state = torch.random.get_rng_state()
    stock = stock_model(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    own = dict(model.named_parameters())
    shared = [name for name, weight in stock.named_parameters() if name in own]
    assert len(shared) == 5  # embeddings, head and three norms
    for name in shared:
        assert stock.get_parameter(name).data_ptr() == own[name].data_ptr(), name
    layer = model.get_submodule("model.layers.0.mlp.up_proj").dequantize(torch.float32)
    assert torch.equal(stock.get_submodule("model.layers.0.mlp.up_proj").weight, layer)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    put(stock, {})
    assert not any(weight.requires_grad for weight in stock.parameters())


def test_importance_is_the_mean_square_of_inputs_without_all_logits_at_once(monkeypatch) -> None:
    stock = stock_model(llama())
    names = ["model.layers.0.mlp.down_proj", "lm_head"]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        stock.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(inputs[0].double().flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        stock(input_ids=IDS)
    for handle in handles:
        handle.remove()
    widest: list[int] = []
    stock.lm_head.register_forward_hook(lambda *it: widest.append(it[-1].shape[-2]))
    monkeypatch.setattr("quant.export.hf.trial.CHUNK", 5)
    found = importance(stock, IDS, names)
    assert max(widest) <= 5
    for name in names:
        expected = torch.cat(seen[name]).square().mean(0)
        torch.testing.assert_close(found[name].double(), expected, rtol=2e-2, atol=1e-6)


def test_how_generation_ends_is_kept() -> None:
    model = llama()
    model.generation_config.eos_token_id = [3, 5]
    assert stock_model(model).generation_config.eos_token_id == [3, 5]


def test_a_tied_head_stays_one_with_the_table() -> None:
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SMALL)
    config.tie_word_embeddings = True
    stock = stock_model(quantized(config))
    assert stock.get_output_embeddings().weight is stock.get_input_embeddings().weight


def test_the_written_candidate_is_the_one_that_was_measured(source: Path, tmp_path: Path) -> None:
    model = llama()
    report = export_hf(model, source, tmp_path / "out", IDS, ["symmetric"])
    measured = {}
    stock = stock_model(model)
    reference = Reference(model, IDS)
    linear = [n for n, m in stock.named_modules() if isinstance(m, torch.nn.Linear)]
    names = list(portable_plan(model, linear).schemes)
    inputs = importance(stock, IDS, names)
    for tried in candidates(model, portable_plan(model, linear), ["symmetric"], None, inputs):
        packed = tried.pack()
        put(stock, packed)
        measured[tried.name] = reference.compare(stock)[0]
        if tried.name == report.choice:
            kept = packed["model.layers.0.mlp.up_proj"].tensors()["weight_packed"]
    assert measured == report.kl and report.choice == min(measured, key=measured.__getitem__)
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(held["model.layers.0.mlp.up_proj.weight_packed"], kept)
    assert report.kl_to_codes == report.kl[report.choice]


def test_the_original_is_the_reference(source: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SMALL)
    original = AutoModelForCausalLM.from_config(config).eval()
    model = llama()
    report = export_hf(model, source, tmp_path / "out", calibration=IDS, original=original)
    assert report.choice.endswith("from the original")  # the codes are random: far from it
    assert report.kl_of_model is not None
    assert report.kl[report.choice] == min(report.kl.values()) < report.kl_of_model / 10
    assert report.kl_to_codes > report.kl_of_model / 10
