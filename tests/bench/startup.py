"""The way of a spec until its first stage begins: files imported, and how often things are found.

    python -m tests.bench.startup [CHECKOUT]

Runs `stillhouse run` of the small job of `tests.bench.golden` in CHECKOUT (default: this one) and
ends it where the first stage begins. Prints JSON: how many files of the four packages the driver
has imported by then, and how often it has called what finds models, corpora, folders and configs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.golden import write_inputs

ROOT = Path(__file__).resolve().parents[2]
COUNTED = ("find_model", "open_corpus", "open_store", "read_config")
PROGRAM = """
import json, os, sys, threading
from collections import Counter
root, counted = sys.argv[1], set(sys.argv[2].split(","))
calls = Counter()

def look(frame, event, _):
    code = frame.f_code
    if event != "call" or not code.co_filename.startswith(root):
        return
    if code.co_name in counted:
        calls[code.co_name] += 1
    elif code.co_name == "emit" and frame.f_locals.get("event") == "stage_start":
        paths = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
        files = [path for path in paths if path.startswith(root)]
        print("LIST", sorted(p[len(root):] for p in files))
        print("FOUND", json.dumps({"files": len(files), **{n: calls[n] for n in sorted(counted)}}))
        sys.stdout.flush()
        os.kill(os.getpid(), 2)

sys.setprofile(look)
threading.setprofile(look)
sys.argv = ["stillhouse", "run", "job.yaml"]
import runpy
runpy.run_module("jobs", run_name="__main__")
"""


def main(checkout: Path) -> int:
    """0, with the figures printed."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        # The log takes stdout from the moment that the run begins.
        command = [sys.executable, "-c", PROGRAM, str(checkout), ",".join(COUNTED)]
        env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, env=env, capture_output=True)
        logs = Path(folder, "runs", "job", "logs")
        text = "".join(path.read_text() for path in logs.glob("*.log"))
    found = next(line for line in text.splitlines() if line.startswith("FOUND "))
    print(json.dumps(json.loads(found.removeprefix("FOUND "))))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT))
