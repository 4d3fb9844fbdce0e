"""How long the targets of `make` take: runs a command and records its seconds.

    python -m tests.bench.timing NAME [--begun PATH] [--done PATH] [--size FOLDER] -- COMMAND ...

Written to runs/timings.json, by kind of processor, if the command ends with exit code 0. `--done`:
where this path was there before, the same work was done before, and the record is of `again`.
`--begun`: where this path was there before and `--done` was not, a part of the work was done
before, and nothing is recorded. `--size`: the MB of this folder afterwards are recorded too.
`make bench-demo` reads them. Needs no package, so that it can watch an install.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from trainer.processor import cpu_kind

FILE = Path("runs/timings.json")
NAMES = ("install_s", "install_mb", "demo_s", "again_s", "test_s")


def timings(path: Path = FILE) -> dict[str, float | None]:
    """What was recorded on this kind of processor; None for what was not."""
    found = _read(path).get(cpu_kind(), {})
    return {name: found.get(name) for name in NAMES}


def record(values: dict[str, float], path: Path = FILE) -> None:
    """Adds values of this kind of processor."""
    found = _read(path)
    found[cpu_kind()] = {**found.get(cpu_kind(), {}), **values}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")


def _read(path: Path) -> dict[str, dict[str, float]]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def megabytes(folder: Path) -> float:
    """MB of the files in a folder."""
    return sum(each.lstat().st_size for each in folder.rglob("*") if not each.is_dir()) / 1e6


def main(arguments: list[str]) -> int:
    """The command's exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--begun", type=Path)
    parser.add_argument("--done", type=Path)
    parser.add_argument("--size", type=Path)
    parser.add_argument("command", nargs="+")
    asked = parser.parse_args(arguments)
    done = asked.done is not None and asked.done.exists()
    begun = not done and asked.begun is not None and asked.begun.exists()
    began = time.monotonic()
    # The terminal sends Ctrl-C to the command too, which may take its time to end.
    signal.signal(signal.SIGINT, lambda *_: None)
    code = subprocess.run(asked.command).returncode
    seconds = time.monotonic() - began
    if code == 0 and not begun:
        name = "again" if done else asked.name
        values = {f"{name}_s": round(seconds, 1)}
        if asked.size is not None:
            values[f"{name}_mb"] = round(megabytes(asked.size))
        record(values)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
