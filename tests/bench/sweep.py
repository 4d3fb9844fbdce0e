"""The sweep measured: the fan-out's cost, the demo's makespan, allocation, recovery, tasks.

    make demo && make bench-sweep

Reads runs/demo; runs empty tasks over ten simulated nodes; quantizes the demo's student by one
command, with a multiple-choice task made from text that it was not trained on. Prints the table,
writes tests/bench/results/sweep/KIND.json and the table of docs/sweep.md, and ends with exit code 1
if an aim is missed. `--only fanout|demo|tasks` measures one part and keeps the other figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.storage import Store, open_store, read_events
from quant.evaluation.bootstrap import difference_interval, relative_reduction
from tests.bench.docs import fill
from tests.bench.figures import machine, read_result, result_file, tables_by_kind, write_result

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "sweep.md"
COMMAND = "make demo && make bench-sweep"
PARTS = ("fanout", "demo", "tasks")
DOCUMENTS = 400  # of the task


def fanout() -> dict[str, Any]:
    """Empty cells over ten nodes, in a process of their own."""
    command = [sys.executable, "-m", "tests.bench.sweep_fanout"]
    out = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(out[out.index("{") :])
    return found


def demo(run: Store) -> dict[str, Any]:
    """Makespan, allocated cells against uniform ones, recovered cells against plain ones.

    Raises FileNotFoundError if the demo was not run.
    """
    done = [e for e in read_events(run) if e["event"] == "stage_done" and e["stage"] == "sweep"]
    told = max((e["metrics"] for e in done), key=lambda metrics: metrics.get("busy_s", 0))
    cells = {path.split("/")[1]: run.read_json(path) for path in run.glob("cells/*/result.json")}
    return {
        "cells": len(cells),
        "failed_cells": sum(cell["status"] != "done" for cell in cells.values()),
        "evaluate_s": told["evaluate_s"],
        "busy_s": told["busy_s"],
        "slots": told["slots"],
        "makespan_ratio": told["evaluate_s"] / (told["busy_s"] / told["slots"]),
        "allocation": allocation(cells),
        "recovery": recovery(cells),
        "memory": memory(cells),
    }


def sums(cell: dict[str, Any], name: str = "kl_to_reference") -> tuple[list[float], list[float]]:
    """A value's sums over the sequences of `report`, and their tokens."""
    each = cell["per_sequence"]
    return each[name], each["tokens"]


def allocation(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Each allocated cell beside the uniform one of the same or the next larger size, on report."""
    found = []
    for key, cell in sorted(cells.items()):
        if cell["budget_mb"] is None:
            continue
        uniform = {
            name: other
            for name, other in cells.items()
            if other["budget_mb"] is None
            and other["recovered"] is None
            and other["model"] == cell["model"]
            and other["bytes"] >= cell["bytes"]
        }
        name = min(
            uniform, key=lambda each: (uniform[each]["bytes"], -uniform[each]["spec"]["bits"])
        )
        ours, tokens = sums(cell)
        theirs, _ = sums(uniform[name])
        less = difference_interval(ours, theirs, tokens)
        found.append(
            {
                "cell": key,
                "bytes": cell["bytes"],
                "kl": cell["kl_to_student"],
                "uniform": name,
                "uniform_bytes": uniform[name]["bytes"],
                "uniform_kl": uniform[name]["kl_to_student"],
                "difference": [less.value, less.low, less.high],
            }
        )
    return found


def recovery(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Each recovered cell beside its plain one: by how much KL is lower, on report."""
    found = []
    for key, cell in sorted(cells.items()):
        if cell["recovered"] is None:
            continue
        plain = cells[key.removesuffix("-recovered")]
        before, tokens = sums(plain)
        after, _ = sums(cell)
        lower = relative_reduction(before, after, tokens)
        found.append(
            {
                "cell": key,
                "bits": cell["spec"]["bits"],
                "steps": cell["recovered"]["steps"],
                "seconds": cell["recovered"]["seconds"],
                "kl": [plain["kl_to_student"], cell["kl_to_student"]],
                "kl_to_teacher": [plain["kl_to_teacher"], cell["kl_to_teacher"]],
                "reduction": [lower.value, lower.low, lower.high],
            }
        )
    return found


def memory(cells: dict[str, Any]) -> dict[str, Any]:
    """What cells were foretold to take over what their processes took at most."""
    ratios = [
        cell["predicted_memory_bytes"] / cell["eval_peak_bytes"]
        for cell in cells.values()
        if cell["eval_peak_bytes"]
    ]
    return {"predicted_over_peak": [min(ratios), max(ratios)]} if ratios else {}


def tasks(run: Store) -> dict[str, Any]:
    """The demo's student quantized by one command, with a task made from the report part."""
    from tests.fixtures.lm_eval_tasks import write_task

    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as temporary:
        folder = write_task(Path(temporary) / "task", held_out(run), context_words=12)
        command = [sys.executable, "-m", "jobs", "quantize", str(run.local("student"))]
        command += ["--bits", "4,2", "--group-size", "64", "--name", "tasks"]
        command += ["--storage", f"{temporary}/runs", "tracking.mode=disabled"]
        command += [f"sweep.tasks=[{{folder: {folder}, limit: {DOCUMENTS}}}]"]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        made = open_store(f"{temporary}/runs/tasks")
        own = made.read_json("evaluations/student.json")["tasks"]["heldout"]
        found: dict[str, Any] = {"documents": own["documents"], "student": own["accuracy"]}
        for key in ("hqq-4b-g64", "hqq-2b-g64"):
            told = made.read_json(f"cells/{key}/result.json")["tasks"]["heldout"]
            names = ("accuracy", "right_to_wrong", "wrong_to_right", "mcnemar_p")
            found[key] = {name: told[name] for name in names}
    return found


def held_out(run: Store) -> list[str]:
    """Texts of the demo's report part, each of one document."""
    from transformers import AutoTokenizer

    from trainer.corpus.corpus import open_corpus

    names = [path for path in run.list("state") if path.startswith("prepare-")]
    corpus = run.read_json(f"state/{max(names)}")["outputs"]["corpus"]
    opened = open_corpus(open_store(ROOT / "runs" / "_corpora" / corpus))
    tokenizer = AutoTokenizer.from_pretrained(opened.tokenizer_folder())
    part = opened.part("report")
    batch = part.batch(list(range(len(part))))
    texts = []
    for ids, positions in zip(batch.input_ids, batch.position_ids, strict=True):
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            piece = ids[start:stop]
            # Long documents give several questions.
            for first in range(0, len(piece) - 40, 40):
                texts.append(tokenizer.decode(piece[first : first + 80], skip_special_tokens=True))
    return texts


def aims(found: dict[str, Any]) -> dict[str, bool]:
    """What is aimed at, as far as it was measured, and whether it is reached."""
    reached = {}
    if "empty_cells_1000_s" in found:
        cost, rss = found["s_per_cell"], found["driver_rss_mb"]
        reached["1,000 empty cells over 10 nodes in under 60 s"] = found["empty_cells_1000_s"] < 60
        reached["cost per cell at 2,000 at most 1.5 times that at 100"] = (
            cost["2000"] <= 1.5 * cost["100"]
        )
        reached["driver memory flat: at most 5 % more from 1,000 to 2,000 more cells"] = (
            rss["2000"] <= 1.05 * rss["1000"]
        )
    if "makespan_ratio" in found:
        better = [item for item in found["allocation"] if item["difference"][2] < 0]
        two = [item["reduction"][0] for item in found["recovery"] if item["bits"] == 2]
        three = [item["reduction"][1] for item in found["recovery"] if item["bits"] == 3]
        reached["at least 12 cells, none failed"] = (
            found["cells"] >= 12 and not found["failed_cells"]
        )
        reached["makespan at most 1.15 of the cells' time over the slots"] = (
            found["makespan_ratio"] <= 1.15
        )
        reached["allocated beats uniform of its size or larger at two budgets"] = len(better) >= 2
        reached["recovery lowers KL at 2 bits by at least 30 %"] = bool(two) and min(two) >= 0.3
        reached["recovery lowers KL at 3 bits"] = bool(three) and min(three) > 0
    if "tasks" in found:
        told = found["tasks"]
        reached["flips add up with the accuracies"] = all(
            abs(
                (cell["accuracy"] - told["student"]) * told["documents"]
                - (cell["wrong_to_right"] - cell["right_to_wrong"])
            )
            < 1e-6
            for key, cell in told.items()
            if key.startswith("hqq")
        )
    return reached


def table(found: dict[str, Any]) -> str:
    """The figures as markdown."""
    lines = ["| what | figure |", "|---|---|"]
    if "empty_cells_1000_s" in found:
        cost, rss = found["s_per_cell"], found["driver_rss_mb"]
        lines += [
            f"| 1,000 empty cells, ten simulated nodes | {found['empty_cells_1000_s']:.1f} s |",
            f"| seconds per empty cell, of 100, of 2,000 | {cost['100']:.4f}, {cost['2000']:.4f} |",
            f"| driver after 1,000 and 2,000 more | {rss['1000']:.0f}, {rss['2000']:.0f} MB |",
        ]
    if "makespan_ratio" in found:
        lines.append(
            f"| demo: {found['cells']} cells, makespan over (sum of task times / {found['slots']}) "
            f"| {found['makespan_ratio']:.2f} |"
        )
        for item in found["allocation"]:
            value, low, high = (1e3 * each for each in item["difference"])
            lines.append(
                f"| {item['cell']} ({item['bytes'] / 1e6:.3f} MB) against {item['uniform']} "
                f"({item['uniform_bytes'] / 1e6:.3f} MB), KL x 1000 | "
                f"{1e3 * item['kl']:.2f} against {1e3 * item['uniform_kl']:.2f}: "
                f"{value:+.2f} [{low:+.2f}, {high:+.2f}] |"
            )
        for item in found["recovery"]:
            value, low, high = (100 * each for each in item["reduction"])
            before, after = (1e3 * each for each in item["kl"])
            lines.append(
                f"| {item['cell']}, {item['steps']} steps, KL x 1000 "
                f"| {before:.2f} to {after:.2f}: {value:.0f} % lower [{low:.0f}, {high:.0f}] |"
            )
    if "tasks" in found:
        told = found["tasks"]
        for key in ("hqq-4b-g64", "hqq-2b-g64"):
            cell = told[key]
            lines.append(
                f"| task of {told['documents']} held-out continuations, {key} against the student "
                f"| {100 * cell['accuracy']:.1f} against {100 * told['student']:.1f} %: "
                f"{cell['right_to_wrong']} lost, {cell['wrong_to_right']} gained, "
                f"p = {cell['mcnemar_p']:.2f} |"
            )
    return "\n".join(lines)


def tables(found: dict[str, Any]) -> dict[str, str]:
    """The docs' table by its name."""
    return {"sweep-figures": table(found)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")
    only = parser.parse_args().only
    run = open_store(ROOT / "runs" / "demo")
    path = result_file("sweep")
    found: dict[str, Any] = read_result(path) if only else {}
    if only in (None, "demo"):
        found |= demo(run)
    if only in (None, "tasks"):
        found["tasks"] = tasks(run)
    if only in (None, "fanout"):
        found |= fanout()
    reached = aims(found)
    names = ("torch", "transformers", "ray", "hqq", "lm-eval")
    found |= {
        "command": COMMAND,
        "aims": reached,
        "machine": machine(),
        "versions": {name: version(name) for name in names},
    }
    write_result(path, found)
    fill(DOCS, tables_by_kind("sweep", tables))
    print(table(found))
    for aim, is_reached in reached.items():
        print(f"{'reached' if is_reached else 'MISSED '}  {aim}")
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
