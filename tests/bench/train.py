"""Training measured: speeds, memory, and what students learn from each signal.

    make demo && make bench-train

Prints the tables and writes them, as tests/bench/results/train/KIND.json and into
docs/benchmarks.md. Ends with exit code 1 if an aim is missed. `--only speed|memory|heldout`
measures one part and keeps the figures of the others.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import version
from typing import Any

from tests.bench import loss_memory, train_docs, train_heldout, train_speed
from tests.bench.figures import machine, read_result, result_file, write_result

COMMAND = "make demo && make bench-train"
PARTS = ("speed", "memory", "heldout")


def aims(found: dict[str, Any]) -> dict[str, bool]:
    """What is aimed at, as far as it was measured, and whether it is reached."""
    result = {}
    if "over" in found:
        over = found["over"]
        for cached in ("cached_sample", "cached_topk"):
            result[f"{cached} at least as fast as ce"] = over[f"{cached}/ce"] >= 1
            result[f"{cached} at most 5 % slower than ce_fused"] = (
                over[f"{cached}/ce_fused"] >= 0.95
            )
            result[f"{cached} >= 3.3 x online"] = over[f"{cached}/online"] >= 3.3
            result[f"{cached} >= 5 x trl_gkd"] = over[f"{cached}/trl_gkd"] >= 5
    if "loss_extra_bytes" in found:
        extra = found["loss_extra_bytes"]
        result["fused loss: a tenth of the dense one's memory"] = (
            extra["fused"] <= 0.1 * extra["dense"]
        )
    if "heldout" in found:
        result["sample within 0.02 nats of online"] = found["sample_over_online"] <= 0.02
        result["sample below ce"] = found["sample_over_ce"] < 0
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS)
    asked = parser.parse_args().only
    path = result_file("train")
    found: dict[str, Any] = read_result(path) if asked else {}
    began = time.monotonic()
    if asked in (None, "memory"):
        found["loss_extra_bytes"] = {
            "dense": loss_memory.dense_bytes(),
            "fused": loss_memory.fused_bytes(),
            "dense_bf16": loss_memory.dense_bytes("bfloat16"),
            "fused_bf16": loss_memory.fused_bytes("bfloat16"),
        }
    if asked in (None, "speed"):
        found |= train_speed.measure()
    if asked in (None, "heldout"):
        found |= train_heldout.measure()
    found |= {
        "command": COMMAND,
        "aims": aims(found),
        "seconds": {**found.get("seconds", {}), asked or "all": round(time.monotonic() - began)},
        "machine": {**machine(), "threads": 1},
        "versions": {
            name: version(name) for name in ("torch", "transformers", "deepspeed", "trl", "numba")
        },
    }
    write_result(path, found)
    train_docs.write()
    print(train_docs.text(found))
    for aim, reached in found["aims"].items():
        print(f"{'reached' if reached else 'MISSED '}  {aim}")
    return 0 if all(found["aims"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
