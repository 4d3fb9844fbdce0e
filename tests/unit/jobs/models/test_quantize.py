"""quantize --out as a user calls it, on tiny models."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jobs.cli.main import main
from quant.artifact import load_quantized, read_description, save_quantized
from quant.artifact.sizes import true_bits_per_weight
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from tests.fixtures.corpora import save_model
from tests.fixtures.model_commands import WIDTHS, run, sizes, told


def test_what_quantize_prints_is_what_it_wrote(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "quantize model --bits 4 --group-size 32 --embeddings --head --out deep/q4"
    assert run(command) == 0
    out = capsys.readouterr().out.splitlines()
    total, weights = sizes(here / "deep/q4"), (here / "deep/q4/quantized.safetensors")
    tensors = list(load_file(weights).values())
    count = read_description("deep/q4")["parameters"]
    held = sum(tensor.nbytes for tensor in tensors)
    dense = total - held + 2 * count
    assert out[0] == "wrote deep/q4"
    assert out[1] == (
        f"size: {total / 1000:.3g} kB, {total / dense:.2f} of the {dense / 1000:.3g} kB that the "
        "folder has in 16 bits"
    )
    assert out[2] == f"bits: {8 * held / count:.2f} true bits per weight"
    assert out[3] == f"16-bit: {norms(tensors) / held:.0%} of the bytes stay in 16 bits"
    assert out[4].startswith("quantized in ") and out[5].startswith("kernel: ")
    assert out[6] == "run it: stillhouse generate deep/q4 --prompt TEXT"
    assert {path.name for path in (here / "deep/q4").iterdir()} >= {
        "quant.json",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert list((here / "deep").iterdir()) == [here / "deep/q4"]


def norms(tensors: list[torch.Tensor]) -> int:
    """Bytes of what is quantized in no way: vectors."""
    return sum(tensor.nbytes for tensor in tensors if tensor.dim() == 1)


def test_a_large_share_in_16_bits_is_reported_with_what_lowers_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("quantize model --bits 4 --out q4") == 0
    line = capsys.readouterr().out.splitlines()[3]
    tensors = load_file(here / "q4/quantized.safetensors")
    ends = [tensor for name, tensor in tensors.items() if "embed" in name or "lm_head" in name]
    kept = norms(list(tensors.values())) + sum(tensor.nbytes for tensor in ends)
    share = kept / sum(tensor.nbytes for tensor in tensors.values())
    assert len(ends) == 2 and share > 1 / 3
    assert line.startswith(f"16-bit: {share:.0%} of the bytes stay in 16 bits at 4 bits;")
    assert "--embeddings --head" in line


def test_the_default_group_size_divides_all_layers(here: Path) -> None:
    assert run("quantize model --bits 4 --out q4") == 0
    assert read_description("q4")["spec"]["group_size"] == 32  # the model is 32 wide
    layers = read_description("q4")["layers"].values()
    assert {layer["group_size"] for layer in layers} == {32}
    assert run("generate model --bits 4 --prompt ab --max-new-tokens 2") == 0


def test_quantize_is_the_python_way_in_a_command(here: Path, artifact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
    save_quantized(
        quantize(model, QuantSpec(4, 32), dtype=torch.bfloat16), here / "own", QuantSpec(4, 32)
    )
    name = "quantized.safetensors"
    assert (artifact / name).read_bytes() == (here / "own" / name).read_bytes()
    assert read_description(artifact)["spec"] == QuantSpec(4, 32).to_dict()


def test_layers_have_bits_of_their_own(here: Path) -> None:
    command = "quantize model --bits 4 --group-size 32 --out mixed --layer model.layers.0.*=16"
    assert main([*command.split(), "--layer", "*.down_proj=8:64", "--layer", "*=5"]) == 0
    layers = read_description("mixed")["layers"]
    assert not any(name.startswith("model.layers.0.") for name in layers)
    assert {(name.split(".")[-1], e["bits"], e["group_size"]) for name, e in layers.items()} == {
        ("down_proj", 8, 64),
        *((f"{n}_proj", 5, 32) for n in ("q", "k", "v", "o", "up", "gate")),
    }


def test_int8_dynamic_needs_no_bits(here: Path) -> None:
    assert run("quantize model --method int8-dynamic --out d") == 0
    assert read_description("d")["spec"]["method"] == "int8-dynamic"
    assert run("generate d --prompt ab --max-new-tokens 2") == 0


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            "--bits 8,4 --group-size 32,64 --method hqq,rtn",
            [
                f"{option}: got {values}; may be one value: --out writes one model; leave it away "
                "to compare several"
                for option, values in (
                    ("--bits", "8, 4"),
                    ("--group-size", "32, 64"),
                    ("--method", "hqq, rtn"),
                )
            ],
        ),
        (
            "--bits 7,x --group-size 12 --method awq",
            [
                f"--bits: got 7, x; may be {WIDTHS}",
                "--group-size: got 12; may be a multiple of 8, from 8 on, or channel",
                "--method: got awq; may be hqq, rtn, int8-dynamic",
            ],
        ),
        ("", [f"--bits: is missing; may be one of {WIDTHS}"]),
        ("--bits ,", [f"--bits: got nothing, nothing; may be {WIDTHS}"]),
        (
            "--bits 4 --method int8-dynamic",
            ["--method int8-dynamic: has --bits 8 and --group-size channel, no others"],
        ),
        (
            "--bits 4 --layer x --layer *.up=9 --layer a=4:",
            [
                "--layer x: may be GLOB=BITS, GLOB=BITS:GROUP or GLOB=16, e.g. "
                '"*.mlp.down_proj=8:64"',
                "--layer *.up=9: 9 bits are not offered by hqq; may be [8, 6, 5, 4, 3, 2, 1]",
                "--layer a=4:: may be GLOB=BITS, GLOB=BITS:GROUP or GLOB=16, e.g. "
                '"*.mlp.down_proj=8:64"',
            ],
        ),
        (
            "--bits 4 --data x --name y sweep.bits=[4]",
            [
                f"{what}: has no meaning with --out, which measures nothing; leave one of them away"
                for what in ("--data", "--name", "override sweep.bits=[4]")
            ],
        ),
    ],
)
def test_wrong_options_of_quantize(
    arguments: str, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, f"quantize model {arguments} --out new") == lines
    assert not Path("new").exists()


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights is a failure of the test."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("jobs.models.quantize.load_unquantized", fail)


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--bits 4 --out model", "--out: model is not empty; may be a new folder"),
        ("--bits 4 --out model/config.json", "--out: model/config.json is a file; may be"),
        ("--bits 4 --out s3://b/x", "--out: got s3://b/x; may be a local folder"),
        ("--bits 4 --group-size 64 --out new", "group_size 64 does not do for layer model.layers"),
        ("--bits 4 --group-size 8 --layer *.nix=4 --out new", "--layer *.nix: matches no layer"),
        ("--bits 4 --device cuda --out new", "--device: got cuda, but torch sees no GPU here"),
    ],
)
def test_what_does_not_fit_is_told_before_weights_are_read(
    arguments: str, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = told(capsys, f"quantize model {arguments}")
    assert found.startswith(line), found
    assert not Path("new").exists()


@pytest.mark.usefixtures("weightless")
def test_tied_embeddings_and_head_go_together(
    here: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(here / "tied", folder / "tokenizer", tied=True)
    (line,) = told(capsys, "quantize tied --bits 4 --group-size 8 --head --out new")
    assert line.startswith("head without embeddings: LlamaForCausalLM ties its head")


def test_models_that_are_none(
    here: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    may_be = "may be a model's folder or URL, a run with --cell, or a hub id such as"
    (here / "empty").mkdir()
    for name, start in (
        ("q4", "q4: is quantized already; give the 16-bit model"),
        ("nowhere", f"nowhere: no such folder; {may_be}"),
        ("empty", f"empty: holds no config.json; {may_be}"),
        ("model/config.json", f"model/config.json: is a file; {may_be}"),
    ):
        (line,) = told(capsys, f"quantize {name} --bits 4 --out new")
        assert line.startswith(start)
    (here / "model/model.safetensors").write_bytes(b"\x10" + b"\0" * 30)
    (line,) = told(capsys, "quantize model --bits 4 --group-size 32 --out new")
    assert "the weights cannot be loaded" in line and not Path("new").exists()


def test_once_written_an_interrupt_says_nothing_else(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quant.kernels.use_kernels", stop)
    assert run("quantize model --bits 4 --group-size 32 --out new") == 130
    assert "nothing was written" not in capsys.readouterr().err
    assert read_description(here / "new")


def test_the_kernels_are_those_of_the_whole_model(folder: Path) -> None:
    """Told by a few small layers, which leaves the model as it was."""
    from jobs.models.quantize import fastest_kernels
    from quant.kernels import kernel_names, use_kernels
    from quant.layers.linear import quant_linears

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    spec = QuantSpec(4, 32, embeddings=True, head=True)
    model = quantize(model, spec, {"*.up_proj": QuantSpec(8, 32), "*.q_proj": QuantSpec(4, 8)})
    use_kernels(model, "plain")
    told = fastest_kernels(model, "cpu")
    assert {layer.kernel for layer in quant_linears(model).values()} == {"plain"}
    use_kernels(model, "speed")
    assert told == kernel_names(model)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
            "the GPU has too little memory for it; give --device cpu, or end what else it runs",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "this machine has too little memory for it; end what else it runs",
        ),
    ],
)
@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("quant.quantize.quantize_weight", "quantize model --bits 4 --group-size 32 --out new"),
        ("trainer.models.load.load_model", "quantize model --bits 4 --group-size 32 --out new"),
        ("quant.quantize.quantize_weight", "generate model --bits 4 --group-size 32 --prompt a"),
        ("transformers.LlamaForCausalLM.forward", "generate model --prompt a"),
    ],
)
def test_too_little_memory_is_one_line(
    place: str,
    command: str,
    error: Exception,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(place, fail)
    assert run(command) == 3
    assert capsys.readouterr().err == f"error: model: {line}\n"
    assert not Path("new").exists()


def test_the_16_bit_model_stays_off_the_gpu(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """Its weights go there one by one, the whole of it never (the device here is `meta`)."""
    from jobs.models.find import find
    from jobs.models.quantize import load_and_quantize

    asked: list[Any] = []

    def quantized(model: Any, spec: Any, layers: Any, dtype: Any, device: Any, *_: Any) -> Any:
        asked.append((device, {parameter.device.type for parameter in model.parameters()}))
        return model

    monkeypatch.setattr("quant.quantize.quantize", quantized)
    load_and_quantize(find("model", "runs", "quantize"), QuantSpec(4, 32), {}, "meta")
    assert asked == [("meta", {"cpu"})]


def test_a_model_without_a_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (here / "model").glob("tokenizer*"):
        path.unlink()
    assert run("quantize model --bits 4 --group-size 32 --out q4") == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "tokenizer: the model has none, so none was copied; copy one into the folder to run it"
    )


def test_all_of_a_tokenizer_is_copied(here: Path) -> None:
    names = ["sentencepiece.bpe.model", "qwen.tiktoken", "chat_template.jinja", "notes.jinja"]
    for name in names:
        (here / "model" / name).write_text("x")
    (here / "model/additional_chat_templates").mkdir()
    (here / "model/additional_chat_templates/rag.jinja").write_text("y")
    assert run("quantize model --bits 4 --group-size 32 --out q4") == 0
    assert all((here / "q4" / name).read_text() == "x" for name in names[:3])
    assert not (here / "q4/notes.jinja").exists()
    assert (here / "q4/additional_chat_templates/rag.jinja").read_text() == "y"


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_an_interrupt_leaves_nothing(
    here: Path, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the midst of quantizing, and in the midst of writing."""
    before = signal.getsignal(signal.SIGTERM)

    def stop(*_: Any, **__: Any) -> None:
        if how == "ctrl-c":
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGTERM)

    for place in ("quant.quantize.cast_stored", "jobs.models.quantize.copy_tokenizer"):
        with monkeypatch.context() as patched:
            patched.setattr(place, stop)
            assert run("quantize model --bits 4 --group-size 32 --out sub/new") == 130
        assert capsys.readouterr().err.strip() == ("error: interrupted: nothing was written")
        assert not (here / "sub/new").exists() and not list((here / "sub").iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


def test_true_bits_are_those_of_the_loaded_model(artifact: Path) -> None:
    held = read_description(artifact)
    assert true_bits_per_weight(load_quantized(artifact)) == 8 * held["bytes"] / held["parameters"]


def test_experts_are_refused_with_the_option_that_leaves_them(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"vocab_size": 258, "num_local_experts": 2, "architectures": ["MixtralForCausalLM"]}
    (here / "model" / "config.json").write_text(json.dumps(config))
    (line,) = told(capsys, "quantize model --bits 4 --group-size 32 --out q4")
    assert "of MixtralExperts; to leave them so knowingly, say --layer '*.experts=16'" in line
