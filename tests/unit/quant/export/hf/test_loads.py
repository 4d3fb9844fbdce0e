"""Exported folders, loaded by a stock transformers in a process that cannot import this project.

All folders are written once and loaded by one process; each test looks at one of them. What must
come back: the quantized model's own logits where the format holds its codes; otherwise those of a
plain model with the weights that the compressed-tensors package makes of the files.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from quant.codes import Codes
from quant.export.hf.export import HfReport, export_hf
from quant.layers.linear import QuantLinear, quant_linears, quant_weights
from quant.quant_spec import CHANNEL, QuantSpec
from quant.quantize import quantize
from tests.fixtures.stock_transformers import stock_answers

F32, BF16 = torch.float32, torch.bfloat16
IDS = (torch.arange(48).view(3, 16) * 37) % 256
SIZES = {
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}


@dataclass
class Case:
    model: PreTrainedModel
    report: HfReport
    folder: Path


def llama(tied: bool = False, width: int = 64) -> PreTrainedModel:
    return plain(LlamaConfig(hidden_size=width, tie_word_embeddings=tied, **SIZES))


def qwen(tied: bool = False) -> PreTrainedModel:
    return plain(Qwen3Config(hidden_size=64, head_dim=16, tie_word_embeddings=tied, **SIZES))


def plain(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(4)  # so that its predictions differ
    return model


def quantized(
    model: PreTrainedModel, spec: QuantSpec, layers: Any = None, dtype: torch.dtype = BF16
) -> PreTrainedModel:
    return quantize(model, spec, layers, dtype)


def symmetric_codes(model: PreTrainedModel, bits: int, group: int) -> PreTrainedModel:
    """Round to nearest with the zero point in the middle: codes that the format holds."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            groups, middle = linear.weight.unflatten(1, (-1, group)), 1 << (bits - 1)
            scale = (groups.abs().amax(-1) / (middle - 1)).half()
            codes = (groups / scale.float().unsqueeze(-1)).round() + middle
            whole = Codes(codes.flatten(1).to(torch.uint8), scale, scale * 0 + middle, bits)
            model.set_submodule(name, QuantLinear.from_codes(whole))
    return model


MIXED = {"*.v_proj": QuantSpec(8, 32), "*layers.1*down_proj": None, "*o_proj": QuantSpec(2, 32)}
MAKE: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "rtn-4": (lambda: symmetric_codes(llama(), 4, 32), {}),
    "rtn-3-tied": (lambda: symmetric_codes(llama(tied=True), 3, 64), {}),
    "hqq-4": (lambda: quantized(llama(), QuantSpec(4, 32)), {}),
    "hqq-4-symmetric": (lambda: quantized(llama(), QuantSpec(4, 32)), {"formats": ["symmetric"]}),
    "hqq-3-tied-qwen": (lambda: quantized(qwen(tied=True), QuantSpec(3, 64)), {}),
    "hqq-2-qwen-f32": (lambda: quantized(qwen(), QuantSpec(2, 32), dtype=F32), {}),
    "hqq-4-g128": (lambda: quantized(llama(width=128), QuantSpec(4, 128)), {}),
    "hqq-4-channel": (lambda: quantized(llama(), QuantSpec(4, CHANNEL)), {}),
    "hqq-8": (lambda: quantized(llama(), QuantSpec(8, 64)), {}),
    "hqq-6-channel": (lambda: quantized(llama(), QuantSpec(6, CHANNEL)), {}),
    "head": (lambda: quantized(llama(), QuantSpec(4, 32, head=True)), {}),
    "mixed": (lambda: quantized(llama(), QuantSpec(4, 64, head=True), MIXED), {}),
    "dynamic": (lambda: quantized(llama(), QuantSpec(8, CHANNEL, "int8-dynamic"), dtype=F32), {}),
    "exact-3-tied-all": (
        lambda: quantized(llama(tied=True), QuantSpec(3, 8, embeddings=True, head=True), dtype=F32),
        {"formats": ["exact"]},
    ),
    "exact-4-all": (
        lambda: quantized(llama(), QuantSpec(4, 64, embeddings=True, head=True)),
        {"formats": ["exact"]},
    ),
    "exact-mixed": (
        lambda: quantized(llama(), QuantSpec(5, 16, embeddings=True), MIXED, dtype=F32),
        {"formats": ["exact"]},
    ),
    "embeddings": (lambda: quantized(llama(), QuantSpec(4, 32, embeddings=True)), {}),
    "tied-all": (
        lambda: quantized(llama(tied=True), QuantSpec(4, 32, embeddings=True, head=True)),
        {},
    ),
    "bf16": (lambda: quantized(llama(), QuantSpec(4, 32)), {"formats": ["bf16"]}),
    "shards": (lambda: quantized(llama(), QuantSpec(4, 32)), {"shard_bytes": 40_000}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer's files."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def cases(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("exports")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = {}
    for name, (make, settings) in MAKE.items():
        model = make()
        report = export_hf(model, source, folder / name, calibration=IDS, **settings)
        made[name] = Case(model, report, folder / name)
    torch.set_num_threads(threads)
    return made


@pytest.fixture(scope="module")
def answers(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    found = stock_answers({case.folder: IDS for case in cases.values()}, new_tokens=4)
    return {name: found[case.folder] for name, case in cases.items()}


@torch.inference_mode()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([model(input_ids=row[None]).logits.float() for row in IDS])


def unpacked(folder: Path) -> PreTrainedModel:
    """A plain model with the weights that the compressed-tensors package makes of the files."""
    config = json.loads((folder / "config.json").read_text())
    described = config.pop("quantization_config", None)
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    if described:
        parsed = QuantizationConfig.model_validate(described)
        owners = {name.removesuffix(".weight_scale") for name in tensors if "weight_scale" in name}
        for owner in owners:
            held = {
                name.rpartition(".")[2]: tensors.pop(name)
                for name in list(tensors)
                if name.rpartition(".")[0] == owner
            }
            groups = parsed.config_groups.values()
            scheme = next((group for group in groups if owner in group.targets), None) or next(
                group for group in groups if "Linear" in group.targets
            )
            compressor = BaseCompressor.get_value_from_registry(scheme.format or parsed.format)
            tensors[f"{owner}.weight"] = compressor.decompress(held, scheme)["weight"]
    kind = LlamaConfig if config["model_type"] == "llama" else Qwen3Config
    model = AutoModelForCausalLM.from_config(
        kind(**config), dtype=getattr(torch, config["dtype"])
    ).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("name", MAKE)
def test_loads_whole_and_answers_as_its_files_say(
    name: str, cases: dict[str, Case], answers: dict[str, dict[str, Any]]
) -> None:
    case, answer = cases[name], answers[name]
    assert "error" not in answer, answer
    assert answer["odd"] == {}
    assert answer["class"] == type(case.model).__name__
    assert answer["dtype"] == str(case.model.dtype)
    if name != "dynamic":  # its inputs are quantized too: see below
        expected = unpacked(case.folder)
        torch.testing.assert_close(answer["logits"], logits_of(expected), rtol=0, atol=1e-6)
        made = expected.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False)
        assert torch.equal(answer["made"], made)


@pytest.mark.parametrize("name", MAKE)
def test_the_reported_kl_is_that_of_the_loaded_folder(
    name: str, cases: dict[str, Case], answers: dict[str, dict[str, Any]]
) -> None:
    case, answer = cases[name], answers[name]
    if case.report.kl_to_codes is None:
        assert name == "bf16"
        return
    ours, theirs = (
        torch.log_softmax(logits.double(), -1)
        for logits in (logits_of(case.model), answer["logits"])
    )
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
    assert case.report.kl_to_codes == pytest.approx(float(divergence), rel=1e-2, abs=1e-6)
    if case.report.kl:
        assert case.report.kl[case.report.choice] == min(case.report.kl.values())


@pytest.mark.parametrize(
    ("name", "atol"),
    [("rtn-4", 1e-5), ("rtn-3-tied", 1e-5), ("exact-mixed", 1e-5), ("exact-3-tied-all", 6e-3)],
)
def test_codes_that_the_format_holds_answer_as_the_quantized_model(
    name: str, atol: float, cases: dict[str, Case], answers: dict[str, dict[str, Any]]
) -> None:
    """Scales of exact folders are float16 while transformers unpacks: its arithmetic is too."""
    assert cases[name].model.dtype == F32
    torch.testing.assert_close(
        answers[name]["logits"], logits_of(cases[name].model), rtol=0, atol=atol
    )


def test_bf16_is_the_quantized_model_and_is_not_called_4_bit(
    cases: dict[str, Case], answers: dict[str, dict[str, Any]]
) -> None:
    case = cases["bf16"]
    dense = copy.deepcopy(case.model)
    for name, layer in quant_linears(dense).items():
        stock = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        stock.weight.data = layer.dequantize(BF16)
        dense.set_submodule(name, stock)
    torch.testing.assert_close(answers["bf16"]["logits"], logits_of(dense), rtol=0, atol=1e-6)
    assert case.report.format == "bf16"
    assert "No layer is quantized" in case.report.notes[0]
    weights = sum(p.numel() for p in llama().parameters())
    assert case.report.files["model.safetensors"] > 2 * weights
    assert "quantization_config" not in json.loads((case.folder / "config.json").read_text())


def test_dynamic_keeps_the_codes_and_quantizes_inputs(
    cases: dict[str, Case], answers: dict[str, dict[str, Any]]
) -> None:
    """Against the formula in float32: x is rounded to multiples of its largest / 127.5."""
    case = cases["dynamic"]
    dense = unpacked(case.folder)

    def rounded(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        step = inputs[0].abs().amax(-1, keepdim=True) / 127.5
        return ((inputs[0] / step).round().clamp(-128, 127) * step,)

    for name, layer in dense.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.register_forward_pre_hook(rounded)
    torch.testing.assert_close(answers["dynamic"]["logits"], logits_of(dense), rtol=0, atol=1e-5)
    for name, layer in quant_linears(case.model).items():
        stored = load_file(case.folder / "model.safetensors")[f"{name}.weight"]
        assert torch.equal(stored.to(torch.int16) + 128, layer.unpacked().codes.to(torch.int16))
    assert case.report.kl_to_codes is not None and case.report.kl_to_codes < 1e-4
    assert case.report.format == (
        "compressed-tensors int-quantized: int8 weights and inputs, one scale per row"
    )


def test_mixed_bits_share_schemes_where_vllm_joins_layers(cases: dict[str, Case]) -> None:
    report, folder = cases["mixed"].report, cases["mixed"].folder
    tensors = report.tensors
    for layer in (0, 1):
        stem = f"model.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj"):
            name = f"{stem}.self_attn.{part}.weight_packed"
            assert tensors[name] == "int8 symmetric, groups of 32"
        assert tensors[f"{stem}.self_attn.o_proj.weight_packed"] == "int4 symmetric, groups of 32"
        assert tensors[f"{stem}.mlp.up_proj.weight_packed"] == "int4 symmetric, groups of 64"
    assert tensors["model.layers.1.mlp.down_proj.weight"] == "bfloat16"
    assert tensors["lm_head.weight_packed"] == "int4 symmetric, groups of 64"
    raised = [note for note in report.notes if "vLLM joins" in note]
    assert len(raised) == 2 and "model.layers.0.self_attn.q_proj" in raised[0]
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert described["ignore"] == ["model.layers.1.mlp.down_proj"]
    assert described["format"] == "pack-quantized"


def test_whoever_reads_the_config_reads_the_weights(cases: dict[str, Case]) -> None:
    for case in cases.values():
        assert len({path.stat().st_mode for path in case.folder.glob("*.[js]*")}) == 1


def test_bytes_are_those_of_the_files(cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        found = {
            str(path.relative_to(case.folder)): path.stat().st_size
            for path in case.folder.rglob("*")
            if path.is_file()
        }
        assert case.report.files == found, name
        assert case.report.bytes == sum(found.values())
        assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= set(found)
        assert not [path for path in found if path.endswith((".bin", ".pt", ".py"))]


def test_a_table_in_16_bits_is_reported_with_its_bytes(cases: dict[str, Case]) -> None:
    note = [note for note in cases["embeddings"].report.notes if "embed_tokens" in note]
    assert note == [
        "model.embed_tokens is stored as bf16 (vLLM looks up few kinds of quantized tables): "
        "32,768 bytes."
    ]
    assert cases["embeddings"].report.tensors["model.embed_tokens.weight"] == "bfloat16"
    assert "model.embed_tokens.weight_packed" in cases["exact-4-all"].report.tensors
    tied = cases["tied-all"].report
    assert [kind for name, kind in tied.tensors.items() if "embed" in name] == ["bfloat16"]
    stored = load_file(cases["tied-all"].folder / "model.safetensors")["model.embed_tokens.weight"]
    table = quant_weights(cases["tied-all"].model)["model.embed_tokens"]
    assert torch.equal(stored, table.dequantize(BF16))  # not moved with the layers
    assert not [name for name in tied.tensors if name.startswith("lm_head")]


def test_whole_rows_stay_whole_and_groups_are_one_scheme(cases: dict[str, Case]) -> None:
    """Rows of 64 and 128 weights: a group of 64 is a whole row of some layers."""
    assert cases["hqq-4-channel"].report.format.endswith(", one scale per row")
    assert cases["hqq-6-channel"].report.format.endswith("int8 symmetric, one scale per row")
    assert cases["hqq-3-tied-qwen"].report.format.endswith(", groups of 64")
    assert ";" not in cases["hqq-3-tied-qwen"].report.format


def test_shards_are_bounded_and_indexed(cases: dict[str, Case]) -> None:
    files = [path for path in cases["shards"].folder.glob("*.safetensors")]
    assert len(files) >= 3 and "model-00001-of-" in min(files).name
    assert all(path.stat().st_size < 45_000 for path in files)
    index = json.loads((cases["shards"].folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(cases["shards"].report.tensors)
    assert cases["shards"].report.kl == cases["hqq-4"].report.kl


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
