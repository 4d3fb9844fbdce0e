"""Jobs sent through Ray's Jobs API to a cluster of a head and three nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.ray_jobs import RayJobs  # noqa: E402
from cluster.storage import Store, open_store, read_events  # noqa: E402
from jobs.monitor.status import status_of  # noqa: E402
from tests.fixtures import ray_clusters as rays  # noqa: E402
from tests.fixtures import small_job

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT_STEPS = 20
SLOW = {
    "distill__steps": 160,
    "distill__checkpoint_steps": CHECKPOINT_STEPS,
    "distill__control": False,
    "resources__capture__batch_tokens": 64,
    "resources__capture__shard_seconds": 0.05,
    "sweep__bits": [8, 6, 5, 4, 3, 2],
}


@dataclass
class World:
    """A cluster, a teacher, and a job that ran undisturbed on this machine alone."""

    folder: Path
    rays: rays.Rays
    undisturbed: Store

    def job(self, name: str, **changes: Any) -> tuple[str, Store, dict[str, Any]]:
        """The slow job under another storage: its file, its run directory, its spec."""
        return self.spec(slow(self.folder), name, **changes)

    def quick(self, name: str, **changes: Any) -> tuple[str, Store, dict[str, Any]]:
        """A short one."""
        return self.spec(small_job.job_spec(self.folder, 1500), name, **changes)

    def spec(
        self, spec: dict[str, Any], name: str, **changes: Any
    ) -> tuple[str, Store, dict[str, Any]]:
        spec = {**spec, "name": name, "storage": str(self.folder / f"storage-{name}"), **changes}
        return str(small_job.write_spec(spec, self.folder)), small_job.run_store(spec), spec

    def submit(self, path: str, *more: str, **env: str) -> tuple[int, str, str]:
        return small_job.stillhouse(*self.submission(path, *more), cwd=self.folder, **env)

    def submission(self, path: str, *more: str) -> list[str]:
        options = ["--address", self.rays.address, "--shared", str(self.folder)]
        return ["submit", path, *options, *more]

    def status(self, run: Store) -> dict[str, Any]:
        code, out, err = small_job.stillhouse("status", run.url, "--json", cwd=self.folder)
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    def wait(self, run: Store, seconds: float = 400) -> dict[str, Any]:
        """How a run ended."""
        ends = time.monotonic() + seconds
        while True:
            found = self.status(run)
            if found["status"] not in ("queued", "waiting", "running", "restarting", "stopping"):
                return found
            assert time.monotonic() < ends, found
            time.sleep(2)


def slow(folder: Path) -> dict[str, Any]:
    """A job with something to interrupt in every stage."""
    spec = small_job.job_spec(folder, 1500, **SLOW)
    spec["student"] = {"init": "random", "config": small_job.model(128, 4)}
    return spec


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("jobs")
    for spec in (small_job.teacher_spec(folder, 1500), {**slow(folder), "name": "undisturbed"}):
        path = str(small_job.write_spec(spec, folder))
        code, out, err = small_job.stillhouse("run", path, cwd=folder)
        assert code == 0, out + err
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_STATE_HOME", str(folder / "state"))
    with rays.cluster(folder) as found:
        yield World(folder, found, small_job.run_store(spec))
    patch.undo()


def until(run: Store, wanted: Callable[[dict[str, Any]], bool], seconds: float = 300) -> Any:
    """The first event of a run that `wanted` likes."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for event in read_events(run):
            if wanted(event):
                return event
        time.sleep(0.2)
    raise AssertionError(f"no such event: {[e['event'] for e in read_events(run)][-20:]}")


def find(run: Store, kind: str, stage: str) -> list[dict[str, Any]]:
    return [e for e in read_events(run) if e["event"] == kind and e.get("stage") == stage]


def quality(run: Store) -> dict[str, list[Any]]:
    """What the sweep found of every cell, without times."""
    keep = ("perplexity", "accuracy", "kl_to_student", "kl_to_teacher", "bytes")
    return {
        row["key"]: [row[name] for name in keep] for row in small_job.results(run) if row.get("key")
    }


def test_a_submitted_recipe_does_what_the_local_one_does(world: World) -> None:
    """The demo, shortened: the same bytes come out, whichever way it is started."""
    storage = {"here": "local", "there": "submitted", "ray": "by-ray"}
    short = ["distill.steps=20", "sweep.bits=[4]", "sweep.group_size=[64]", "sweep.budgets_mb=[]"]
    short += ["sweep.recover=null", "sweep.models=[student]", "sweep.exclude=[]"]
    short += ["distill.control=false", "distill.evaluate_steps=20"]
    short += ["data.select_sequences=16", "data.report_sequences=16", "tracking.mode=disabled"]
    runs = {}
    for way, name in storage.items():
        where = f"storage={world.folder / name}"
        if way == "here":
            short_teacher = [o for o in short if not o.startswith("sweep")]
            code, out, err = small_job.stillhouse(
                "run", "demo-teacher", where, *short_teacher, cwd=world.folder
            )
            assert code == 0, out + err
            short.append(f"teacher.model={world.folder / name / 'demo-teacher' / 'student'}")
            code, out, err = small_job.stillhouse("run", "demo", where, *short, cwd=world.folder)
        elif way == "there":
            code, out, err = world.submit("demo", where, *short, "--follow")
            assert "distill: 20/20" in out and "demo: done" in out
        else:
            code, out, err = ray_job_submit(world, "demo", where, *short)
        assert code == 0, out + err
        runs[way] = open_store(str(world.folder / name)).sub("demo")
    losses = {way: small_job.losses(run, "distill") for way, run in runs.items()}
    assert losses["here"] == losses["there"] == losses["ray"]
    assert sorted(losses["here"]) == list(range(1, 21))
    weights = {way: run.read_bytes("student/model.safetensors") for way, run in runs.items()}
    assert weights["here"] == weights["there"] == weights["ray"]
    assert quality(runs["here"]) == quality(runs["there"]) == quality(runs["ray"])


def ray_job_submit(world: World, *arguments: str) -> tuple[int, str, str]:
    """The plain way, with Ray's own command."""
    command = [rays.RAY, "job", "submit", "--address", world.rays.address]
    environment = {"working_dir": str(ROOT), "excludes": [".git", ".venv", "runs", "wandb"]}
    command += ["--runtime-env-json", json.dumps(environment), "--"]
    command += ["python", "-m", "jobs", "run", *arguments]
    environ = small_job.environment(RAY_AUTH_MODE="token")
    done = subprocess.run(command, cwd=world.folder, env=environ, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_node_lost_in_every_stage(world: World) -> None:
    path, run, _ = world.job("lost")
    code, out, err = world.submit(path)
    assert code == 0 and "sent" in out, out + err
    until(run, lambda e: e["event"] == "progress" and e["stage"] == "capture" and e["done"] >= 20)
    (start,) = find(run, "capture_start", "capture")
    replace(world, *start["pids"])

    begun = until(run, lambda e: e["event"] == "training_start")
    until(run, lambda e: e["event"] == "step" and e["step"] >= CHECKPOINT_STEPS + 10)
    until(run, lambda e: e["event"] == "checkpoint")
    reached = max(small_job.losses(run, "distill"))
    replace(world, *begun["pids"])
    said, ends = [], time.monotonic() + 300
    while not find(run, "resume", "distill"):
        assert time.monotonic() < ends, said
        said.append(status_of(run))
        time.sleep(0.5)
    (resumed,) = find(run, "resume", "distill")
    restarting = [found.why for found in said if found.word == "restarting"]
    assert restarting and all("attempt 2 of 4" in why for why in restarting), said
    assert not any(found.word == "lost" for found in said)
    assert resumed["step"] > 0 and not set(begun["pids"]) & set(resumed["pids"])
    assert reached - resumed["step"] <= CHECKPOINT_STEPS
    (lost,) = find(run, "group_lost", "distill")
    assert lost["what"] in ("a lost node", "a lost worker")

    where = until(run, lambda e: e["event"] == "cell_start" and driver_is_elsewhere(world, e))
    replace(world, int(where["where"].rpartition("pid ")[2].rstrip(")")))
    end = world.wait(run)
    assert end["status"] == "done" and end["attempt"] == 1, end
    assert small_job.losses(run, "distill") == small_job.losses(world.undisturbed, "distill")
    assert quality(run) == quality(world.undisturbed)


def driver_is_elsewhere(world: World, event: dict[str, Any]) -> bool:
    """Whether a cell runs, and on a node that may be lost: the head has the driver."""
    pid = int(event["where"].rpartition("pid ")[2].rstrip(")"))
    return any(node.holds(pid) for node in world.rays.others)


def replace(world: World, *pids: int) -> None:
    """Takes the power from a node that has one of the processes, and adds another to the cluster.

    Not from the head, on which one of a group's ranks may be.
    """
    node = next(node for node in world.rays.others if any(node.holds(pid) for pid in pids))
    node.kill()
    world.rays.others.remove(node)
    world.rays.add("--num-cpus", "1")


def test_a_rank_that_hangs_is_given_up_on(world: World) -> None:
    """Nothing has died, but one rank does not answer: the others wait for it only so long."""
    path, run, _ = world.job("hangs", sweep=None)
    code, out, err = world.submit(path, "resources.collective_minutes=0.2")
    assert code == 0, out + err
    begun = until(run, lambda e: e["event"] == "training_start")
    until(run, lambda e: e["event"] == "checkpoint")
    os.kill(begun["pids"][1], signal.SIGSTOP)
    lost = until(run, lambda e: e["event"] == "group_lost")
    assert "resources.collective_minutes (0.2)" in lost["why"], lost
    assert world.wait(run)["status"] == "done"
    assert small_job.losses(run, "distill") == small_job.losses(world.undisturbed, "distill")


def test_submitted_twice_it_is_one_job_and_stopped_it_continues(world: World) -> None:
    path, run, _ = world.job("twice")
    both = [small_job.start(*world.submission(path), cwd=world.folder) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    code, out, err = world.submit(path)
    assert code == 0 and "joined" in out, out + err
    mine = [job for job in RayJobs(world.rays.address).all() if job.id.startswith("twice-")]
    assert len(mine) == 1
    code, _, err = world.submit(path, "distill.steps=170")
    assert code == 2 and "distill.steps: 160 -> 170" in err and "stillhouse stop twice" in err

    until(run, lambda e: e["event"] == "step" and e["step"] >= 10)
    code, out, err = small_job.stillhouse("stop", "twice", cwd=world.folder)
    assert code == 0 and "twice: stopped" in out, out + err
    found = world.status(run)
    assert found["status"] == "stopped" and found["ray_status"] == "STOPPED", found
    assert run.glob("checkpoints/*/*.json")
    code, out, err = small_job.stillhouse("stop", "twice", cwd=world.folder)
    assert code == 2 and "is not under way" in err
    code, out, err = small_job.stillhouse("list", "--storage", str(world.folder), cwd=world.folder)
    assert code == 0 and "twice" in out and "stopped" in out, out + err

    code, out, err = world.submit(path, "--follow")
    assert code == 0, out + err
    assert find(run, "resume", "distill")[0]["step"] >= 10
    assert small_job.losses(run, "distill") == small_job.losses(world.undisturbed, "distill")
    code, out, err = small_job.stillhouse("logs", "twice", cwd=world.folder)
    assert code == 0 and "RayTrainWorker" in out


def test_what_can_never_run_is_refused_with_the_numbers(world: World) -> None:
    path, run, _ = world.quick("impossible")
    code, out, err = world.submit(path, "resources.distill={workers: 8, gpus_per_worker: 1}")
    assert code == 2 and "sent" not in out
    assert "8 workers of 1 CPUs and 1 GPUs do not fit, only 0 do" in err
    assert not run.exists("state/submissions")


def test_local_things_are_refused_with_the_way_out(world: World, tmp_path: Path) -> None:
    path, _, _ = world.quick("local")
    code, _, err = small_job.stillhouse(
        "submit", path, "--address", world.rays.address, cwd=world.folder
    )
    assert code == 2
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines), err
    assert "storage=s3://" in lines[0] and "teacher.model" in lines[1]
    assert "run SPEC --until prepare storage=s3://" in lines[2]
    code, _, err = small_job.stillhouse("submit", path, cwd=world.folder)
    assert code == 2 and "--address: missing" in err
    code, _, err = small_job.stillhouse(
        "submit", path, "--address", "http://127.0.0.1:9", cwd=tmp_path
    )
    assert code == 2 and "no Ray dashboard answers there" in err


def test_a_node_with_another_file_system_is_refused(world: World) -> None:
    """The fourth node has a folder of its own in the place of the storage."""
    path, run, spec = world.quick("unshared")
    Path(spec["storage"]).mkdir()
    hide = f'mount -t tmpfs tmpfs {spec["storage"]} && exec "$@"'
    node = world.rays.add("--num-cpus", "1", prefix=["unshare", "--mount", "sh", "-c", hide, "sh"])
    try:
        world.rays.wait_for(5)
        code, out, err = world.submit(path, "--follow")
        assert code == 3 and "does not share" in out, out + err
        assert "s3://bucket/prefix" in out
        assert world.status(run)["status"] == "failed"
    finally:
        node.kill()
        world.rays.others.remove(node)
    code, out, err = world.submit(path, "--follow")
    assert code == 0, out + err


def test_before_a_node_is_taken_away_a_checkpoint_is_saved(world: World) -> None:
    """As for a spot instance: notice first, and the end some seconds later."""
    spec = slow(world.folder)
    rare = {**spec["distill"], "checkpoint_steps": None, "checkpoint_minutes": 60}
    path, run, _ = world.job("notice", distill=rare, sweep=None)
    code, out, err = world.submit(path)
    assert code == 0, out + err
    begun = until(run, lambda e: e["event"] == "training_start")
    until(run, lambda e: e["event"] == "step" and e["step"] >= 10)
    node = next(n for n in world.rays.others for pid in begun["pids"] if n.holds(pid))
    drain(world, node)
    saved = until(run, lambda e: e["event"] == "checkpoint")
    assert saved["step"] < 160
    (notice,) = find(run, "preemption", "distill")
    assert "will be taken away in" in notice["notice"]
    node.kill()
    world.rays.others.remove(node)
    world.rays.add("--num-cpus", "1")
    assert world.wait(run)["status"] == "done"
    assert find(run, "resume", "distill")[0]["step"] == saved["step"]
    assert small_job.losses(run, "distill") == small_job.losses(world.undisturbed, "distill")


def drain(world: World, node: rays.Node) -> None:
    """Gives notice of the end of a node, as a cloud does."""
    raylet = next(p for p in node.processes() if p.name() == "raylet")
    (id_,) = [a.partition("=")[2] for a in raylet.cmdline() if a.startswith("--node_id=")]
    command = [rays.RAY, "drain-node", "--address", world.rays.gcs, "--node-id", id_]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", "120"]
    environ = small_job.environment(RAY_AUTH_MODE="token")
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_job_that_is_not_placed_says_what_it_waits_for(world: World) -> None:
    """Another job has all CPUs."""
    jobs = RayJobs(world.rays.address)
    code = (
        "import ray, time; ray.init();"
        "hold = ray.remote(num_cpus=1)(lambda: time.sleep(600));"
        "ray.get([hold.remote() for _ in range(4)])"
    )
    jobs.submit("holds-all", f"python -c '{code}'", {}, {})
    try:
        path, run, _ = world.quick("placed")
        told, out, err = world.submit(path, "resources.placement_minutes=0.4", "--retries", "0")
        assert told == 0, out + err
        waits = []
        while (found := world.status(run))["status"] in ("queued", "waiting", "running"):
            waits.append(found["why"])
            time.sleep(1)
        assert any("waiting for 1 CPUs: cluster has 4, 0 free" in why for why in waits), waits
        assert found["status"] == "failed" and "resources.placement_minutes" in found["why"]
    finally:
        jobs.stop("holds-all")


SECRETS = {
    "HF_TOKEN": "hf_planted0123456789abcdef",
    "WANDB_API_KEY": "planted0123456789abcdef0123456789abcdef01",
    "AWS_SECRET_ACCESS_KEY": "planted/secret/0123456789abcdef",
    "OPENAI_API_KEY": "sk-planted-0123456789",
}


def test_no_secret_is_left_anywhere(world: World) -> None:
    """The nodes of a cluster have secrets in their environment, and so has whoever submits."""
    (world.folder / "secret").mkdir()
    with rays.cluster(world.folder / "secret", nodes=0, cpus=2, **SECRETS) as found:
        secret = World(world.folder, found, world.undisturbed)
        path, run, spec = secret.quick("secrets")
        code, out, err = secret.submit(path, **SECRETS)
        assert code == 0, out + err
        seen = [out, err]
        while (status := status_of(run)).live or status.word == "unknown":
            seen.append(subprocess.run(["ps", "axww"], capture_output=True, text=True).stdout)
            time.sleep(2)
        assert status.word == "done", status
        jobs = RayJobs(found.address)
        (mine,) = [job.id for job in jobs.all()]
        seen += [jobs.log(mine), str(jobs._client.get_job_info(mine).dict())]
        for folder in (spec["storage"], str(world.folder / "state"), str(found.head.logs())):
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            assert files
            seen += [path.read_bytes().decode("latin-1") for path in files]
        for name, value in SECRETS.items():
            assert not any(value in text for text in seen), name

        code, _, err = secret.submit(path, "name=told", "--forward-env", "HF_TOKEN=abc")
        assert code == 2 and "abc" not in err
        more = ["--redo", "summarize", "--forward-env", "HF_TOKEN"]
        code, out, err = secret.submit(path, *more, **SECRETS)
        assert code == 0 and "warning: HF_TOKEN is sent along" in err
        assert secret.wait(run)["status"] == "done"
