"""The exclusive pass on a local Ray, with a process that dies on the way."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from cluster.resources import ResourceRequest
from cluster.storage import Attempt, Store, open_store
from jobs.sweep.shared import SharedContext, Source
from jobs.sweep.speed_pass import measure_speeds
from quant.grid import uniform
from quant.quant_spec import QuantSpec
from quant.spec import SweepSpec
from tests.unit.quant.conftest import tiny_llama

pytestmark = pytest.mark.timeout(180)

SPECS = [QuantSpec(bits, 32) for bits in (8, 4, 2)]
KEYS = [uniform(spec).key for spec in SPECS]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """A run with a student, and cells of it that have no speeds yet; the 4-bit one is damaged."""
    from quant.artifact import save_quantized
    from quant.quantize import quantize

    store = open_store(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "student")
    for spec, key in zip(SPECS, KEYS, strict=True):
        save_quantized(quantize(tiny_llama(), spec), tmp_path / "cells" / key / "model", spec)
        result = {"status": "done", "model_kept": True, "decode_tokens_per_s": None}
        store.write_json(f"cells/{key}/result.json", result)
    store.write_text(f"cells/{KEYS[1]}/model/quant.json", "{")
    store.write_json("evaluations/student.json", {"name": "tiny"})
    return store


def measure(store: Store) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The pass over all cells of the run: their results, and the events."""
    attempt, events = Attempt.claim(store), []
    sweep = SweepSpec(speed_prompt_tokens=4, speed_decode_tokens=100)
    shared_context = SharedContext(sweep, store, None, attempt, 256, 1, 1, 0)
    source = Source("student", store.sub("student"), "main", "tiny", "tiny", "references")
    context: Any = SimpleNamespace(
        run=SimpleNamespace(store=store),
        attempt=attempt,
        spec=SimpleNamespace(resources=SimpleNamespace(placement_minutes=2)),
        stop=threading.Event(),
        emit=lambda event, **fields: events.append({"event": event, **fields}),
        reporter=SimpleNamespace(say=lambda text: None),
        heartbeat=SimpleNamespace(notify=lambda **fields: None),
    )
    needs: Any = SimpleNamespace(
        exclusive=lambda speeds: (ResourceRequest(2.0, 0), 1), limit_s=60.0
    )
    results = {key: store.read_json(f"cells/{key}/result.json") for key in KEYS}
    models = dict.fromkeys(KEYS, "student")
    measure_speeds(context, shared_context, needs, {"student": source}, models, results)
    return results, events


def kill_after(store: Store, key: str, killed: list[dict[str, Any]]) -> None:
    """Kills the pass's process as soon as a cell has its speed; notes that result."""
    while not (result := store.read_json(f"cells/{key}/result.json"))["decode_tokens_per_s"]:
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        if process.cmdline()[:1] == ["ray::speed 0"]:
            process.kill()
            killed.append(result)


def test_cells_are_measured_once_and_each_by_itself(run: Store) -> None:
    """The process is lost after the first cell; the second is damaged; the third goes on."""
    killed: list[dict[str, Any]] = []
    killer = threading.Thread(target=kill_after, args=(run, KEYS[0], killed), daemon=True)
    killer.start()
    results, events = measure(run)
    killer.join()
    assert killed == [results[KEYS[0]]], "it is not measured again"
    assert results[KEYS[1]]["decode_tokens_per_s"] is None
    assert results[KEYS[2]]["speedup"] > 0
    assert results[KEYS[2]]["baseline_dtype"] in ("bfloat16", "float32")
    failed = [event for event in events if event["event"] == "speed_failed"]
    assert [event["key"] for event in failed] == [KEYS[1]] and "quant.json" in failed[0]["error"]
    assert (events[-1]["done"], events[-1]["total"]) == (3, 3)
    for key in KEYS:
        assert run.read_json(f"cells/{key}/result.json") == results[key]
    student = run.read_json("evaluations/student.json")
    assert student["name"] == "tiny" and student["decode_tokens_per_s"] > 0
    assert student["baseline_dtype"] == results[KEYS[2]]["baseline_dtype"]
