"""Loads exported folders with a stock transformers, in a process that cannot import this project.

The interpreter is started without `site` (so no editable install is found) and gets nothing but the
path of the installed packages. Many folders are loaded by one process: importing takes most of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Of the environment: what starting needs, and what torch holds back of the processor.
KEPT = ("PATH", "LD_LIBRARY_PATH", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")

PROGRAM = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
for name in ("quant", "stillhouse", "jobs", "trainer", "cluster"):
    assert importlib.util.find_spec(name) is None, name
import torch
from transformers import AutoModelForCausalLM, logging
torch.set_num_threads(1)
logging.set_verbosity_error()
wanted = torch.load(sys.argv[2])
answers = {}
for folder, (ids, new) in wanted.items():
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        with torch.inference_mode():
            logits = torch.cat([model(input_ids=row[None]).logits.float() for row in ids])
            made = model.generate(ids[:1, :4], max_new_tokens=new, do_sample=False) if new else None
        answers[folder] = {
            "logits": logits, "made": made, "dtype": str(model.dtype),
            "class": type(model).__name__, "odd": {k: str(v) for k, v in info.items() if v},
        }
    except Exception as error:
        answers[folder] = {"error": f"{type(error).__name__}: {error}"}
torch.save(answers, sys.argv[3])
"""


def stock_answers(wanted: dict[Path, Tensor], new_tokens: int = 0) -> dict[Path, dict[str, Any]]:
    """What stock transformers answers to ids int64 `[n, seq]`, by folder.

    Each answer has logits float32 `[n, seq, vocab]`, made (ids that it generates greedily from four
    of them), dtype, class, and odd: missing, unexpected and mismatched keys; or error, in words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "asked.pt"), Path(scratch, "answered.pt")
        torch.save({str(path): (ids, new_tokens) for path, ids in wanted.items()}, asked)
        packages = sysconfig.get_paths()["purelib"]
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", PROGRAM, packages, str(asked), str(answered)],
            cwd=scratch,
            env={**kept, "HOME": scratch, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answers = torch.load(answered)
    return {Path(folder): answer for folder, answer in answers.items()}
