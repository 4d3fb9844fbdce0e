"""What `stillhouse plan` foretells against what is: the demo's run, DeepSpeed's estimators.

    make demo && make bench-plan

Prints each figure of the demo beside the run's own, model states of 8 billion weights on 8 GPUs
beside the estimators', and how long a plan of 70 billion weights and `--help` take. Writes
tests/bench/results/plan/KIND.json; ends with 1 if a ratio is off by more than a tenth, or the time
of a stage by more than half.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.storage import Store, open_store
from jobs.forecast.forecast import forecast
from jobs.forecast.place import this_machine
from jobs.forecast.training_memory import states
from jobs.report.page_details import lines
from jobs.report.run_data import load_run
from jobs.run.directory import RunDir
from jobs.spec.load import load_spec
from tests.bench.figures import machine, result_file, write_result
from tests.fixtures.forecast_models import LLAMA_8B, LLAMA_70B, folder_of

COMMAND = "make demo && make bench-plan"
BOUND, TIME_BOUND = 0.10, 1.5
PARAMETERS, LARGEST, GPUS = 8_030_261_248, 525_340_672, 8  # Llama 3 8B


def stages(run: Store, name: str) -> dict[str, Any]:
    """Planned and actual seconds of a run's stages, and actual over planned."""
    plan = forecast(load_spec(name), this_machine())
    found = {}
    print(f"{name}:")
    for line in lines(replace(load_run(run), plan=plan)):
        shown = (line.show(line.planned), line.show(line.actual), line.ratio)
        print(f"{line.what:34}" + "".join(f"{text:>22}" for text in shown))
        stage, _, what = line.what.partition(", ")
        if what == "time":
            ratio = line.actual / line.planned
            found[stage] = {"planned": line.planned, "actual": line.actual, "ratio": ratio}
    return found


def cache(run: Store) -> dict[str, Any]:
    """Bytes of the files of the demo's cache beside those of its plan."""
    plan = forecast(load_spec("demo"), this_machine())
    record = RunDir(run).record("capture")
    assert record is not None
    shards = Path("runs/_logits", record.outputs["cache"], "shards")
    stored = sum(path.stat().st_size for path in shards.iterdir())
    foretold = plan["storage"]["cache"]["bytes"]
    return {"bytes": stored, "foretold": foretold, "ratio": foretold / stored}


def model_states() -> dict[str, Any]:
    """Bytes per GPU over DeepSpeed's estimates; of stage 1 over the closed form of its engine."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as three
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as two

    wanted = {
        # Weights in bf16, gradients summed in float32, master weights and two moments in parts.
        1: 6 * PARAMETERS + 12 * PARAMETERS / GPUS,
        2: two(PARAMETERS, GPUS, 1, False, additional_buffer_factor=1.0)[1],
        3: three(PARAMETERS, LARGEST, GPUS, 1, False, False, additional_buffer_factor=1.0)[1],
    }
    found = {}
    for stage, expected in wanted.items():
        own = states(PARAMETERS, PARAMETERS, LARGEST, zero_stage=stage, world=GPUS).device
        found[f"zero_{stage}"] = {"plan": own, "expected": expected, "ratio": own / expected}
    return found


def seconds(*arguments: str) -> float:
    """How long a command takes: the least of three, imports included."""
    command = [str(Path(sys.executable).with_name("stillhouse")), *arguments]
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return min(times)


def large_plan() -> float:
    """Seconds of a plan of 70 billion weights, from configs alone."""
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for key, config in (("teacher", LLAMA_70B), ("student", LLAMA_8B)):
            models.append(f"{key}.model={folder_of(config, Path(folder, key))}")
        options = ["--gpu", "h100", "--gpus", "16", f"storage={folder}"]
        return seconds("plan", "llama-70b-to-8b", *models, *options)


def main() -> int:
    """Exit code."""
    run = open_store("./runs/demo")
    if not run.exists("spec.yaml"):
        print("there is no run of the demo here; make demo", file=sys.stderr)
        return 2
    result = {
        "command": COMMAND,
        "stages": {
            name: stages(open_store(f"./runs/{name}"), name) for name in ("demo-teacher", "demo")
        },
        "cache": cache(run),
        "model_states": model_states(),
        "seconds": {"help": seconds("--help"), "plan_of_70b": large_plan()},
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "ray")},
    }
    write_result(result_file("plan"), result)
    ratios = {"cache": result["cache"]["ratio"]}
    ratios |= {name: each["ratio"] for name, each in result["model_states"].items()}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} of what is")
    print("seconds: " + ", ".join(f"{name} {s:.2f}" for name, s in result["seconds"].items()))
    times = [each["ratio"] for found in result["stages"].values() for each in found.values()]
    off = any(abs(ratio - 1) > BOUND for ratio in ratios.values())
    return int(off or any(not 1 / TIME_BOUND <= ratio <= TIME_BOUND for ratio in times))


if __name__ == "__main__":
    sys.exit(main())
