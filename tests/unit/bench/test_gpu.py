"""The GPU bench runs on a machine that has torch, transformers and safetensors alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import CaptureFixture, MonkeyPatch

from tests.bench import gpu, gpu_decode
from tests.bench.gpu_models import CASES, DEVIATION, Case, config_of, make_model, random_codes
from tests.bench.gpu_steps import Decoder

ROOT = Path(__file__).parents[3]
# What a bare GPU machine does not have.
ABSENT = ("ray", "deepspeed", "hqq", "pydantic", "numba", "pyarrow", "fsspec", "datasets", "wandb")
CODE = """
import runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
sys.argv = ["gpu.py", *sys.argv[2:]]
runpy.run_path("tests/bench/gpu.py", run_name="__main__")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, ",".join(ABSENT), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_it_measures_every_way_without_the_stack() -> None:
    sizes = ("--tokens", "64", "--width", "32", "--vocab", "200")
    done = run("--device", "cpu", *sizes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failed"] == {}
    assert set(found["ms"]) >= {"bare_products", "ce_fused", "kl_topk_fused", "kl_dense_torch"}
    decode = found["decode"]
    assert decode["failed"] == {} and decode["goal"] == 2.4
    assert set(decode["tiny"]) == set(CASES)
    for name, case in decode["tiny"].items():
        assert set(case["decode_tokens_per_s"]["eager"]) == {"bf16", name}
        assert case["kernels"] and case["speedup"] > 0 and case["prefill_tokens_per_s"]
        assert case["relative_error"] < 0.02, "the chosen kernel and the plain path agree"


def test_a_part_that_fails_is_named(monkeypatch: MonkeyPatch, capsys: CaptureFixture[str]) -> None:
    def broken(device: torch.device) -> dict[str, Any]:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(gpu, "decode_part", broken)
    sizes = ["--tokens", "64", "--width", "32", "--vocab", "200"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", *sizes])
    assert gpu.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == {"decode": "RuntimeError: no such"}
    assert found["ms"]["ce_fused"] > 0 and "decode" not in found


def test_what_cannot_be_measured_is_named_and_the_rest_is(monkeypatch: MonkeyPatch) -> None:
    wrong = Case(9, 64)  # no byte holds such codes
    monkeypatch.setitem(gpu_decode.CASES, "wrong", wrong)
    found = gpu_decode.measure(["tiny"], ["wrong", "4bit"], torch.device("cpu"), tokens=2)
    assert set(found["tiny"]) == {"4bit"} and set(found["failed"]) == {"tiny/wrong"}


@pytest.mark.parametrize("case", [None, *CASES])
def test_a_step_is_the_models_own_next_token(case: str | None) -> None:
    """Positions, mask and cache of the bench's decoding, against a pass over the whole text."""
    with torch.no_grad():
        model = make_model(config_of("tiny"), CASES.get(str(case)), torch.device("cpu"))
        decoder = Decoder(model, 8, 32, "eager")
        for _ in range(2):  # also after going back
            decoder.rewind()
            decoder.token.fill_(1)
            tokens = [1] * 9
            for _ in range(12):
                decoder.step()
                tokens.append(int(decoder.token))
            whole = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
            assert whole[8:-1].argmax(-1).tolist() == tokens[9:]


def test_drawn_codes_make_weights_of_the_right_size() -> None:
    drawn = torch.Generator().manual_seed(0)
    for case in CASES.values():
        weight = random_codes(256, 128, case, drawn).dequantize()
        assert weight.std() == pytest.approx(DEVIATION, rel=0.3)
        assert abs(float(weight.mean())) < 0.1 * DEVIATION


def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2 and done.stderr.startswith("error: torch sees no GPU here")
