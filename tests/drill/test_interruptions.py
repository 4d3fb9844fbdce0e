"""A run that is killed, or interrupted, in every stage ends as if nothing had happened.

One job is stopped in capture, then in distill, then in sweep, each time started again by the same
command, and compared with a job that ran undisturbed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.storage import Store, open_store, read_events  # noqa: E402
from tests.fixtures import small_job  # noqa: E402

pytestmark = pytest.mark.timeout(1200)

# Long and in small pieces, so that there is something to interrupt: workers live on for a second
# or two after their driver was killed.
STEPS = 150
DOCUMENTS = 4000
SLOW = {
    "distill__steps": STEPS,
    "distill__checkpoint_steps": 5,
    "data__report_sequences": 64,
    "sweep__bits": [8, 6, 5, 4, 3, 2],
    "resources__capture__batch_tokens": 64,
    "resources__capture__shard_seconds": 0.05,
}


@dataclass(frozen=True)
class World:
    folder: Path
    undisturbed: Store


def teacher_job(folder: Path) -> dict[str, Any]:
    spec = small_job.teacher_spec(folder, DOCUMENTS)
    spec["student"] = {"init": "random", "config": small_job.model(256, 8)}
    return spec


def job(folder: Path, storage: str) -> dict[str, Any]:
    spec = small_job.job_spec(folder, DOCUMENTS, **SLOW)
    return {**spec, "name": "drill", "storage": str(folder / storage)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A teacher, and the job undisturbed on a storage of its own."""
    folder = tmp_path_factory.mktemp("drill")
    teacher = small_job.write_spec(teacher_job(folder), folder)
    code, out, err = small_job.stillhouse("run", str(teacher), cwd=folder)
    assert code == 0, out + err
    spec = job(folder, "undisturbed")
    code, out, err = small_job.stillhouse(
        "run", str(small_job.write_spec(spec, folder)), cwd=folder
    )
    assert code == 0, out + err
    return World(folder, small_job.run_store(spec))


def interrupt(path: Path, world: World, run: Store, how: signal.Signals, stage: str) -> None:
    """Starts the job, stops it in the middle of a stage, and checks how it ended."""
    before = {event["t"] for event in read_events(run)}

    def reached(event: dict[str, Any]) -> bool:
        if event["t"] in before or event.get("stage") != stage:
            return False
        kind = event["event"]
        if stage == "capture":
            return kind == "progress" and 20 <= event["done"] < event["total"] - 20
        if stage == "distill":
            return kind == "step" and 12 <= event["step"] < 60
        return kind == "cell_done"

    end(small_job.start("run", str(path), cwd=world.folder), run, how, reached)


def end(process: Any, run: Store, how: signal.Signals, reached: Callable[..., bool]) -> None:
    """Sends a running job a signal once it has `reached` an event, and checks how it ends."""
    small_job.wait_for(run, reached, process)
    if how == signal.SIGINT:  # as a terminal does: to the whole process group
        os.killpg(process.pid, how)
    else:
        os.kill(process.pid, how)
    out, err = process.communicate(timeout=120)
    if how != signal.SIGKILL:
        assert process.returncode == 130, out + err
        assert "continue with: stillhouse run" in err
        assert not ray_processes_of(process.pid)
    else:
        assert process.returncode == -how


def ray_processes_of(pid: int) -> list[str]:
    """Processes of Ray in the session that the driver led."""
    command = ["ps", "-o", "pid=,args=", "--sid", str(pid)]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if "ray" in line and "defunct" not in line]


def events(run: Store, kind: str, stage: str) -> list[dict[str, Any]]:
    return [e for e in read_events(run) if e["event"] == kind and e.get("stage") == stage]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_stopped_in_every_stage(world: World, how: signal.Signals) -> None:
    spec = job(world.folder, f"storage-{how.name.lower()}")
    path = small_job.write_spec(spec, world.folder)
    run = small_job.run_store(spec)

    interrupt(path, world, run, how, "capture")
    polite = how == signal.SIGINT
    interrupt(path, world, run, signal.SIGTERM if polite else how, "distill")
    starts = events(run, "capture_start", "capture")
    assert starts[0]["present"] == 0 and starts[1]["present"] > 0
    assert starts[1]["missing"] > 0 and not set(starts[0]["pids"]) & set(starts[1]["pids"])
    total = starts[0]["missing"]
    assert starts[1]["present"] + starts[1]["missing"] == total

    interrupt(path, world, run, how, "sweep")
    first, resumed = events(run, "training_start", "distill")[0], events(run, "resume", "distill")
    assert resumed[0]["step"] > 0 and not set(first["pids"]) & set(resumed[0]["pids"])

    kept = {p: run.read_text(p) for p in run.glob("cells/*/result.json")}
    assert kept
    code, out, err = small_job.stillhouse("run", str(path), cwd=world.folder)
    assert code == 0, out + err

    for stage in ("distill", "control"):
        assert small_job.losses(run, stage) == small_job.losses(world.undisturbed, stage)
        assert sorted(small_job.losses(run, stage)) == list(range(1, STEPS + 1))
        assert curve(run, stage) == curve(world.undisturbed, stage)
        assert max(curve(run, stage)) == STEPS and len(curve(run, stage)) == 10
        assert chosen(run, stage) == chosen(world.undisturbed, stage)
    assert_same_records(spec, world)
    keep = ("perplexity", "accuracy", "kl_to_student", "kl_to_teacher", "bytes")
    found, wanted = (
        {row["key"]: [row[name] for name in keep] for row in small_job.results(store)}
        for store in (run, world.undisturbed)
    )
    assert found == wanted
    quality = ("quantize_s", "eval_s", "perplexity")
    for name, text in kept.items():  # finished cells were not made again
        before, after = (small_job.json.loads(t) for t in (text, run.read_text(name)))
        assert [before[key] for key in quality] == [after[key] for key in quality]


def curve(run: Store, stage: str) -> dict[int, list[float]]:
    """What the evaluations on `select` found, by step."""
    names = ("select_ce", "select_forward_kl")
    return {e["step"]: [e[name] for name in names] for e in events(run, "evaluation", stage)}


def chosen(run: Store, stage: str) -> list[Any]:
    """Which weights became the model, and what they reach on `select`."""
    metrics = events(run, "training_done", stage)[-1]["metrics"]
    names = ("best_step", "weights", "select_ce", "last_select_ce")
    return [metrics[name] for name in names]


def assert_same_records(spec: dict[str, Any], world: World) -> None:
    """The cache holds the sequences of the undisturbed one, each once read, with equal records."""
    from trainer.logits.reader import CacheReader

    found, wanted = (
        open_store(storage).sub("_logits")
        for storage in (spec["storage"], str(world.folder / "undisturbed"))
    )
    for kind in ("train", "eval"):
        (name,) = wanted.list()
        one, other = CacheReader(found.sub(name), kind), CacheReader(wanted.sub(name), kind)
        assert np.array_equal(one.keys, other.keys)
        for key in one.keys:
            a, b = one.read(key.tobytes()), other.read(key.tobytes())
            assert np.array_equal(a.ids, b.ids) and np.array_equal(a.log_probs, b.log_probs)


def test_ctrl_c_before_the_workers_are_at_work(world: World) -> None:
    spec = job(world.folder, "storage-early")
    process = small_job.start(
        "run", str(small_job.write_spec(spec, world.folder)), cwd=world.folder
    )
    end(process, small_job.run_store(spec), signal.SIGINT, lambda e: e["event"] == "launch")


def test_a_lost_worker_is_replaced_without_a_new_run(world: World) -> None:
    spec = job(world.folder, "storage-lost")
    run = small_job.run_store(spec)
    process = small_job.start(
        "run", str(small_job.write_spec(spec, world.folder)), cwd=world.folder
    )
    small_job.wait_for(
        run,
        lambda e: e["event"] == "step" and e["stage"] == "distill" and 12 <= e["step"] < 60,
        process,
    )
    os.kill(events(run, "training_start", "distill")[0]["pids"][1], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    (resumed,) = events(run, "resume", "distill")
    assert resumed["step"] > 0 and resumed["attempt"] == 1
    for stage in ("distill", "control"):
        assert small_job.losses(run, stage) == small_job.losses(world.undisturbed, stage)


def test_stopped_from_another_terminal_by_force(world: World) -> None:
    """While a third one reads along."""
    spec = job(world.folder, "storage-force")
    run = small_job.run_store(spec)
    process = small_job.start(
        "run", str(small_job.write_spec(spec, world.folder)), cwd=world.folder
    )
    small_job.wait_for(run, lambda e: e["event"] == "step" and e["step"] >= 12, process)
    reader = small_job.start("logs", run.url, "--follow", cwd=world.folder)
    code, out, err = small_job.stillhouse(
        "stop", "drill", "--storage", spec["storage"], "--wait", "0", "--force", cwd=world.folder
    )
    assert code == 0 and "drill: stopped, ended by force" in out, out + err
    process.communicate(timeout=30)
    assert process.returncode == 130
    text, err = reader.communicate(timeout=60)
    assert reader.returncode == 0 and "RayTrainWorker" in text, err
    code, out, err = small_job.stillhouse(
        "status", "drill", "--storage", spec["storage"], cwd=world.folder
    )
    assert code == 0 and "continue   stillhouse run SPEC" in out, out + err
    code, out, err = small_job.stillhouse("run", str(world.folder / "drill.yaml"), cwd=world.folder)
    assert code == 0, out + err
    assert events(run, "resume", "distill")[0]["step"] > 0
    assert small_job.losses(run, "distill") == small_job.losses(world.undisturbed, "distill")
