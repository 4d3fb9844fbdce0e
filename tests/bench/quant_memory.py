"""Resident memory of a process that loads one model and decodes, over that after its imports.

python -m tests.bench.quant_memory FOLDER NAME      # prints JSON; a fresh process per model
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def measure(folder: Path, names: list[str]) -> dict[str, dict[str, int]]:
    """By model: bytes while decoding, and at the highest (loading included)."""
    found = {}
    for name in names:
        command = [sys.executable, "-m", "tests.bench.quant_memory", str(folder), name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[name] = json.loads(done.stdout)
    return found


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (at its highest) of this process in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) << 10


def _one(folder: Path, name: str) -> dict[str, Any]:
    import torch

    from quant.kernels import kernel_names  # noqa: F401  imports are the baseline
    from tests.bench.quant_speed import timed
    from tests.bench.quant_world import DECODE_PROMPT, load, shape, write_base  # noqa: F401

    before = _resident("VmRSS")
    model = load(name, folder)
    prompt = torch.arange(5, 5 + DECODE_PROMPT)[None]
    timed(model, prompt, 16, "eager")
    return {"decoding": _resident("VmRSS") - before, "highest": _resident("VmHWM") - before}


if __name__ == "__main__":
    print(json.dumps(_one(Path(sys.argv[1]), sys.argv[2])))
