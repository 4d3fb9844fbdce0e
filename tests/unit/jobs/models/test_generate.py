"""generate as a user calls it, on tiny models."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from quant.artifact import load_quantized
from tests.fixtures.corpora import chat_tokenizer, save_model
from tests.fixtures.model_commands import WIDTHS, run, told
from trainer.processor import fast_dtype


def reference(model: Any, prompt: str, tokens: int) -> str:
    """What transformers' own generate gives, decoded at once."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=1)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def run_generate(capsys: pytest.CaptureFixture[str], command: str) -> tuple[str, str]:
    capsys.readouterr()
    assert run(f"generate {command}") == 0
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    return out, err.strip()


def test_generate_runs_every_kind_of_model(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = getattr(torch, fast_dtype())
    plain = AutoModelForCausalLM.from_pretrained("model", dtype=fast)
    cells = {
        "model": plain,
        "q4": load_quantized(artifact, dtype=fast),
        "model --bits 4 --group-size 32": load_quantized(artifact, dtype=fast),
        "q4 --prefer plain --threads 1 --device cpu": load_quantized(
            artifact, prefer="plain", dtype=fast
        ),
        "q4 --dtype float32": load_quantized(artifact, dtype=torch.float32),
    }
    for arguments, model in cells.items():
        out, err = run_generate(capsys, f"{arguments} --prompt word --max-new-tokens 12")
        assert out.removesuffix("\n") == reference(model, "word", 12).removesuffix("\n")
        assert err.startswith("prompt: 4 tokens, ") and "; generated: 12 tokens, " in err
        assert "as many as asked for; kernel: " in err and err.endswith("B")
    assert f"kernel: {fast_dtype()} matmul" in run_generate(capsys, "model --prompt a")[1]


def test_the_prompt_may_be_piped_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("näx\n"))
    piped, err = run_generate(capsys, "model --max-new-tokens 5")
    assert err.startswith("prompt: 4 tokens")  # bytes; the line's end is not part of it
    assert piped == run_generate(capsys, "model --max-new-tokens 5 --prompt näx")[0]
    monkeypatch.setattr(sys, "stdin", StringIO("\n"))
    assert told(capsys, "generate model") == ["--prompt: is empty; may be a text, also piped in"]


def test_drawing_is_repeated_by_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(more: str) -> str:
        return run_generate(capsys, f"model --prompt ab --temperature 3 {more}")[0]

    assert drawn("--seed 1 --top-p 0.9") == drawn("--seed 1 --top-p 0.9") != drawn("--seed 2")


def test_a_message_goes_through_the_chat_template(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, "generate model --prompt a --chat") == [
        "--chat: model has no chat template; leave --chat away"
    ]
    tokenizer = chat_tokenizer(here / "chat-tokenizer")
    save_model(here / "chat", here / "chat-tokenizer")
    text = "<|im_start|>user\nba<|im_end|>\n<|im_start|>assistant\n"
    _, err = run_generate(capsys, "chat --prompt ba --chat --max-new-tokens 2")
    assert err.startswith(f"prompt: {len(tokenizer(text)['input_ids'])} tokens")


def test_wrong_inputs_of_generate(
    here: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hint = "leave --bits away, or give the 16-bit model"
    idle = "has none, only hub ids do; leave it away"
    assert told(capsys, "quantize model --bits 4 --revision v1 --out new") == [
        f"--revision v1: model {idle}"
    ]
    assert told(capsys, "generate run --cell x --revision v1 --prompt a") == [
        f"--revision v1: the cell x of run {idle}"
    ]
    for command, lines in {
        "q4 --bits 3 --prompt a": [f"--bits 3: q4 is quantized already (hqq-4b-g32); {hint}"],
        "model --group-size 8 --prompt a": ["--group-size 8: needs --bits"],
        "model --bits 3,4 --prompt a": ["--bits: got 3, 4; may be one value: one model is run"],
        "model --revision main --prompt a": [f"--revision main: model {idle}"],
        "model --prefer plain --prompt a": [
            "--prefer plain: model has no layers of stillhouse quantize, which alone have a choice "
            "of kernels; leave it away, or give --bits"
        ],
        "model --seed 1 --top-p 2 --bits 9 --prompt a": [
            "--top-p: got 2; may be above 0, up to 1",
            "--top-p and --seed: nothing is drawn at temperature 0; give --temperature, e.g. 1",
            f"--bits: got 9; may be {WIDTHS}",
        ],
        "model --temperature -1 --prompt a": [
            "--temperature: got -1; may be 0 (the likeliest token), or 0.0001 and more"
        ],
        "model --temperature 1 --seed -1 --prompt a": [
            "--seed: got -1; may be 0 to 9223372036854775807"
        ],
        f"model --threads {os.cpu_count() + 1} --prompt a": [
            f"--threads: got {os.cpu_count() + 1}; may be 1 to {os.cpu_count()}, the CPUs of this "
            "machine"
        ],
        f"model --prompt {'a' * 40}": [
            "prompt: has 40 tokens, but the model has 32 positions, for prompt and new tokens "
            "together; give one of at most 31 tokens"
        ],
    }.items():
        assert told(capsys, f"generate {command}") == lines
    (artifact / "tokenizer.json").unlink()
    (line,) = told(capsys, "generate q4 --prompt a")
    assert line == (
        "q4/tokenizer.json: is not there; copy tokenizer.json and tokenizer_config.json of the "
        "model that this one was made from into the folder"
    )
    description = json.loads((artifact / "quant.json").read_text())
    (artifact / "quant.json").write_text(json.dumps({**description, "format": 1}))
    shutil.copy("model/tokenizer.json", artifact)
    (line,) = told(capsys, "generate q4 --prompt a")
    assert "format 1" in line and "quantize the model again" in line


def test_ctrl_c_stops_with_the_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    seen: list[str] = []
    echo: Callable[..., None] = typer.echo

    def interrupted(message: str = "", **how: Any) -> None:
        echo(message, **how)
        if not how.get("err") and not seen:
            seen.append(message)
            raise KeyboardInterrupt

    monkeypatch.setattr("jobs.models.generate.typer.echo", interrupted)
    assert run("generate model --prompt ab --max-new-tokens 25") == 130
    out, err = capsys.readouterr()
    assert out.rstrip("\n") == seen[0].rstrip("\n")
    assert "stopped; kernel" in err and len(err.splitlines()) == 1
