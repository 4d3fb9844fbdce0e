"""The GPU bench runs on a machine that has torch, transformers and safetensors alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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


def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2 and done.stderr.startswith("error: torch sees no GPU here")
