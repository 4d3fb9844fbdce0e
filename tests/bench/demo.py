"""What the demo reached: checks it against the aims, and keeps the figures.

    make demo && make bench-demo

Reads runs/demo-teacher and runs/demo, writes tests/bench/results/demo/KIND.json, and ends with exit
code 1 if an aim is missed: a student of at most 20 % of the teacher's parameters that keeps at
least 90 % of its next-token accuracy, below the control's perplexity, and a 4-bit cell of group
size 64 that keeps at least 98.2 % of the student's accuracy. What make took, as far as
`tests.bench.timing` saw it, stands beside the figures.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

from cluster.storage import Store, open_store, read_events
from tests.bench.figures import machine, result_file, write_result
from tests.bench.timing import timings

COMMAND = "make demo && make bench-demo"


def seconds(run: Store) -> dict[str, float]:
    """Seconds of each stage that was run, and of all attempts together (without their imports)."""
    found = {"attempts": 0.0}
    for event in read_events(run):
        if event["event"] == "stage_done":
            found[event["stage"]] = round(event["seconds"], 1)
        elif event["event"] == "run_end":
            found["attempts"] += round(event["seconds"], 1)
    return found


def measure(storage: Store) -> dict[str, Any]:
    """The demo's figures; raises FileNotFoundError if it was not run."""
    run = storage.sub("demo")
    rows = run.read_json("report/results.json")["rows"]
    teacher, student, control = (
        next(row for row in rows if row["role"] == role)
        for role in ("teacher", "student", "control")
    )
    cells = {row["key"]: row for row in rows if row["role"] == "cell"}
    figures = {
        "parameters_percent": 100 * student["parameters"] / teacher["parameters"],
        "student_retention": student["retention"],
        "control_retention": control["retention"],
        "student_perplexity": student["perplexity"],
        "control_perplexity": control["perplexity"],
        "teacher_perplexity": teacher["perplexity"],
        "cell_4b_g64_retention": cells["hqq-4b-g64"]["retention"],
        "cells": len(cells),
        "failed_cells": sum(row["status"] != "done" for row in cells.values()),
        "decode_speedup_4b_g64": cells["hqq-4b-g64"]["speedup"],
    }
    aims = {
        "parameters_percent <= 20": figures["parameters_percent"] <= 20,
        "student_retention >= 90": figures["student_retention"] >= 90,
        "student_perplexity < control_perplexity": student["perplexity"] < control["perplexity"],
        "cell_4b_g64_retention >= 98.2": figures["cell_4b_g64_retention"] >= 98.2,
        "cells >= 12, none failed": len(cells) >= 12 and not figures["failed_cells"],
    }
    return {
        "command": COMMAND,
        "figures": figures,
        "aims": aims,
        "seconds": {
            "demo-teacher": seconds(storage.sub("demo-teacher")),
            "demo": seconds(run),
        },
        "timings": timings(),
        "machine": machine(),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "deepspeed", "ray", "hqq")
        },
    }


def main() -> int:
    result = measure(open_store("./runs"))
    write_result(result_file("demo"), result)
    for name, value in result["figures"].items():
        print(f"{name:28} {value:.4g}")
    for name, value in result["timings"].items():
        print(f"{name:28} {'not measured' if value is None else format(value, '.4g')}")
    for aim, reached in result["aims"].items():
        print(f"{'reached' if reached else 'MISSED '}  {aim}")
    return 0 if all(result["aims"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
