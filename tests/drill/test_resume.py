"""Checkpoints on real process groups: another number of ranks, uploads on the side, damage."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.ranks import Log, Ranks, Told, spawn, start
from tests.fixtures.waiting import until
from tests.system.test_training import KEPT, World, make_world

STEPS, FIRST, SECOND = 10, 2, 4
UPLOADED = "00000008"  # the checkpoint whose upload hangs or fails
DECAY = 0.3
LORA = {"r": 4, "alpha": 8}
CASES: dict[str, dict[str, Any]] = {
    "z1-float32": {"zero_stage": 1},
    "z2-float32": {"zero_stage": 2},
    "z3-float32": {"zero_stage": 3},
    "z1-bfloat16": {"zero_stage": 1, "dtype": "bfloat16"},
    "z3-bfloat16": {"zero_stage": 3, "dtype": "bfloat16"},
    "z2-lora": {"zero_stage": 2},
    "z3-lora": {"zero_stage": 3},
    "z2-offload": {"zero_stage": 2, "offload": "cpu"},
    "z3-offload": {"zero_stage": 3, "offload": "cpu"},
}


# What runs on the ranks.


def train_all(jobs: list[tuple[Any, int | None]]) -> list[Told]:
    """Trains each job, with a stop asked for in step so-and-so (None: no stop).

    Told.logits: what each of its steps read, the groups of its optimizer before the first step, and
    Adam's counts of steps then and after the last.
    """
    from trainer.training import loop
    from trainer.training.checkpoint import CheckpointMisfit
    from trainer.training.student import StudentWithLoss
    from trainer.worker import Stopped

    worker = start()
    forward, resume, step = StudentWithLoss.forward, loop._Run.resume, loop._Run._step
    results = []
    for job, stop_at in jobs:
        log = Log(stop_at)
        told = Told(log.events)
        seen: dict[str, Any] = {"sequences": [], "groups": []}
        told.logits = seen

        def spy_forward(module: Any, *args: Any, seen=seen, **inputs: Any) -> Any:
            if module.training:
                rows = inputs["input_ids"].cpu().numpy()
                real = inputs["token_weights"].reshape(len(rows), -1).sum(1) > 0
                seen["sequences"][-1].extend(row.tobytes() for row in rows[real.cpu().numpy()])
            return forward(module, *args, **inputs)

        def spy_resume(run: Any, *args: Any, seen=seen) -> None:
            resume(run, *args)
            inner = run.engine.optimizer.optimizer
            seen["groups"] = [
                {key: value for key, value in group.items() if key != "params"}
                for group in inner.param_groups
            ]
            seen["first"] = counts(run.engine)

        def spy_step(run: Any, *args: Any, seen=seen) -> Any:
            seen["sequences"].append([])
            done = step(run, *args)
            seen["last"] = counts(run.engine)
            return done

        StudentWithLoss.forward = spy_forward
        loop._Run.resume, loop._Run._step = spy_resume, spy_step
        try:
            told.metrics = loop.train(job, replace(worker, hooks=log.hooks(attempt=1)))
        except (Stopped, CheckpointMisfit) as error:
            told.error = f"{type(error).__name__}: {error}"
            names = job.checkpoints.glob("0*/state/*.pt")
            told.held_bytes = sum(job.checkpoints.size(name) for name in names)
        finally:
            StudentWithLoss.forward = forward
            loop._Run.resume, loop._Run._step = resume, step
        results.append(told)
    return results


def counts(engine: Any) -> list[int]:
    """How many steps Adam has counted, for each tensor that it updates."""
    return [int(state["step"]) for state in engine.optimizer.optimizer.state.values()]


class Held:
    """Mixed into a store: after an upload `hold` is called with the folder's name."""

    def __init__(self, store: Any, hold: Callable[[str], None]) -> None:
        super().__init__(store._backend, store._prefix)
        self.hold = hold

    def upload_folder(self, local_dir: Any, p: str) -> None:
        super().upload_folder(local_dir, p)
        self.hold(p)


def train_held(jobs: list[tuple[Any, str]]) -> list[Told]:
    """Trains jobs of whose second rank uploads last until the training is at its last step
    ("late"), or the second does not end ("hangs") or fails ("fails")."""
    from cluster.storage import Store
    from trainer.training import loop
    from trainer.training.checkpoint import CheckpointFailed, CheckpointMisfit

    worker = start()
    held_store = type("HeldStore", (Held, Store), {})
    own_step = loop._Run._step
    done: list[int] = []

    def spy_step(run: Any, step: Any, *args: Any) -> Any:
        told = own_step(run, step, *args)
        done.append(step.number + 1)
        return told

    loop._Run._step = spy_step
    results = []
    for job, how in jobs:
        log = Log()
        told = Told(log.events)
        done.clear()

        def hold(folder: str, how=how) -> None:
            if how == "late":
                until(lambda: done and done[-1] == STEPS)
            if how == "hangs" and folder.startswith(UPLOADED):
                time.sleep(600)
            if how == "fails" and folder.startswith(UPLOADED):
                raise OSError("connection reset")

        if worker.rank == 1:
            job = replace(job, checkpoints=held_store(job.checkpoints, hold))
        try:
            told.metrics = loop.train(job, replace(worker, hooks=log.hooks(attempt=1)))
        except (CheckpointFailed, CheckpointMisfit) as error:
            told.error = f"{type(error).__name__}: {error}"
        results.append(told)
    return results


# The trainings.


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("resume"), {"cache": KEPT})


def make_jobs(world: World, suffix: str) -> dict[str, Any]:
    """A training of each case, in folders of its own."""
    jobs = {}
    for name, options in CASES.items():
        values = {"steps": STEPS, "weight_decay": DECAY, "warmup_ratio": 0.3, **options}
        job = world.job(f"{name}{suffix}", evaluate_steps=None, **values)
        if name.endswith("lora"):
            from trainer.spec.sections import LoraSpec

            student = job.student.model_copy(update={"lora": LoraSpec(**LORA)})
            job = replace(job, student=student)
        jobs[name] = job
    return jobs


@pytest.fixture(scope="module")
def trained(world) -> dict[str, dict[str, list[Told]]]:
    """whole: undisturbed on two ranks; head, on two, middle, on one, tail, on two: one training."""
    moved = make_jobs(world, "-moved")
    jobs = [(job, None) for job in make_jobs(world, "").values()]
    jobs += [(job, FIRST) for job in moved.values()]
    jobs.append((world.job("saved", zero_stage=3, evaluate_steps=None), FIRST))
    told = list(zip(*spawn(train_all, jobs, world=2), strict=True))
    spoil(world)
    few = [(job, SECOND - FIRST) for job in moved.values()]
    few += [(world.job(f"few-{name}", zero_stage=3), None) for name in ("missing", "torn")]
    middle = list(zip(*spawn(train_all, few, world=1), strict=True))
    tail = zip(*spawn(train_all, [(job, None) for job in moved.values()], world=2), strict=True)
    return {
        "whole": dict(zip(CASES, told, strict=False)),
        "head": dict(zip(CASES, told[len(CASES) :], strict=False)),
        "middle": dict(zip([*CASES, "missing", "torn"], middle, strict=True)),
        "tail": dict(zip(CASES, tail, strict=True)),
    }


# The file that is spoilt: of rank 1, so that rank 0 hears of it.
VICTIM = "state/zero_pp_rank_1_mp_rank_00_optim_states.pt"


def saved_name(folder: Path, step: int = 2) -> str:
    """The name of a training's checkpoint of a step, which ends in a token."""
    (record,) = folder.glob(f"{step:08d}-0001-*.json")
    return record.stem


def spoil(world: World) -> None:
    """Copies of the checkpoint of two ranks, each spoilt in its own way."""
    folder = world.root / "checkpoints"
    saved = saved_name(folder / "saved")
    victim, json_name = f"{saved}/{VICTIM}", f"{saved}.json"
    for name in ("damaged", "missing", "broken", "stage", "few-missing", "few-torn"):
        shutil.copytree(folder / "saved", folder / name)
    data = bytearray((folder / "damaged" / victim).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "damaged" / victim).write_bytes(bytes(data))
    for name in ("missing", "few-missing", "few-torn"):
        (folder / name / victim).unlink()
    (folder / "broken" / json_name).write_text('{"step": 2')
    for name in ("stage", "few-torn"):
        record = json.loads((folder / name / json_name).read_text())
        if name == "stage":
            record["zero_stage"] = 2
        else:  # nothing is damaged, and yet it is not whole
            del record["files"][VICTIM]
        (folder / name / json_name).write_text(json.dumps(record))


@pytest.fixture(scope="module")
def killed(world) -> list[str]:
    """What is there of a training that was killed while its second checkpoint was uploaded."""
    ranks = Ranks(train_held, [(held_job(world, "killed"), "hangs")], world=2)
    folder = world.root / "checkpoints" / "killed"

    def both_there() -> bool:
        assert all(process.poll() is None for process in ranks.processes)
        files = list(folder.glob(f"{UPLOADED}-0001-*/state/*optim*"))
        return len(files) == 2 and len(list(folder.glob("00000004-0001-*.json"))) == 1

    until(both_there, 120)
    for process in ranks.processes:
        process.kill()
    with pytest.raises(AssertionError, match="ranks ended with"):
        ranks.results()
    return sorted(path.name for path in folder.iterdir())


def held_job(world: World, name: str, every: int = 4) -> Any:
    return world.job(
        name, zero_stage=2, steps=STEPS, checkpoint_steps=every, keep_checkpoints=3,
        evaluate_steps=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uploaded(world, trained, killed) -> list[dict[str, Told]]:
    """By rank: uploads that are late, that fail, that were killed; checkpoints that are spoilt."""
    jobs = {
        "late": (held_job(world, "late", every=6), "late"),
        "failing": (held_job(world, "failing"), "fails"),
        "killed": (held_job(world, "killed"), ""),
    }
    for name in ("damaged", "missing", "broken", "stage"):
        jobs[name] = (world.job(name, zero_stage=3), "")
    results = spawn(train_held, list(jobs.values()), world=2)
    return [dict(zip(jobs, told, strict=True)) for told in results]


@pytest.mark.parametrize("name", CASES)
def test_another_number_of_ranks_goes_on_as_if_nothing_had_happened(trained, name) -> None:
    whole, *parts = (trained[part][name][0] for part in ("whole", "head", "middle", "tail"))
    assert [part.steps() for part in parts] == [[1, 2], [3, 4], [5, 6, 7, 8, 9, 10]]
    resumes = [part.first("resume") for part in parts[1:]]
    assert [(e["step"], e["saved_by"], e["world"]) for e in resumes] == [(2, 2, 1), (4, 1, 2)]
    moved = [value for part in parts for value in part.values()]
    away = np.abs(np.array(moved) - whole.values())
    assert away[:FIRST].max() == 0
    assert away.max() < (1e-5 if "bfloat16" not in name else 1e-3)
    learnt = whole.values()[0] - whole.values()[-1]
    assert learnt > (0.005 if name.endswith("lora") else 0.02)  # equality is of something
    assert parts[2].metrics["tokens"] == whole.metrics["tokens"]


@pytest.mark.parametrize("name", CASES)
def test_hyperparameters_are_those_of_each_group(trained, name) -> None:
    """Under ZeRO-3 DeepSpeed gives every group those of the first."""
    for part in ("whole", "middle", "tail"):
        for rank in trained[part][name]:
            groups = rank.logits["groups"]
            decays = [group["weight_decay"] for group in groups]
            assert decays == ([DECAY] if name.endswith("lora") else [DECAY, 0.0])
            for key in ("betas", "eps", "lr", "fused"):
                assert [group[key] for group in groups] == [groups[0][key]] * len(groups)
            assert groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("name", CASES)
def test_adam_counts_its_steps_once(trained, name) -> None:
    for part, steps in (("middle", FIRST), ("tail", SECOND)):
        for rank in trained[part][name]:
            last = trained[part][name][0].steps()[-1]
            assert (set(rank.logits["first"]), set(rank.logits["last"])) == ({steps}, {last})


@pytest.mark.parametrize("name", CASES)
def test_every_sequence_is_read_once_per_epoch(world, trained, name) -> None:
    """In the order of the schedule, whatever the number of ranks."""
    schedule = world.job("unused", steps=STEPS).schedule(world.corpus)
    part = world.corpus.part("train")
    wanted = []
    for step in range(STEPS):
        rows = part.batch(schedule.step_indices(step)).input_ids
        wanted.append(sorted(row.astype(np.int64).tobytes() for row in rows))
    steps: list[list[bytes]] = []
    for phase in ("head", "middle", "tail"):
        ranks = [rank.logits["sequences"] for rank in trained[phase][name]]
        steps += [sorted(sum(rows, [])) for rows in zip(*ranks, strict=True)]
    assert steps == wanted


def test_a_checkpoint_of_adapters_holds_no_other_weights(trained) -> None:
    for stage in (2, 3):
        adapters, all_weights = (
            trained["head"][f"z{stage}-{kind}"][0].held_bytes for kind in ("lora", "float32")
        )
        assert 0 < adapters < 0.5 * all_weights


# What cannot be loaded.


def test_a_spoilt_checkpoint_is_refused_by_name(world, uploaded) -> None:
    folder = world.root / "checkpoints"
    saved = saved_name(folder / "damaged")
    victim, record = f"{saved}/{VICTIM}", f"{saved}.json"
    wanted = {
        "damaged": f"{folder / 'damaged' / victim}: damaged: its hash differs; delete "
        f"{folder / 'damaged' / record} to continue from the checkpoint before it",
        "missing": f"{folder / 'missing' / victim}: missing; delete "
        f"{folder / 'missing' / record} to continue from the checkpoint before it",
        "stage": f"{folder / 'stage' / saved}: was written with distill.zero_stage=2, "
        "this run has 3; set it back, or start over with --redo distill",
    }
    for rank in uploaded:
        for name, line in wanted.items():
            assert rank[name].error == f"CheckpointMisfit: {line}"
        broken = rank["broken"].error
        assert broken.startswith(f"CheckpointMisfit: {folder / 'broken' / record} is not valid")
        assert broken.endswith("to continue from the checkpoint before it")
        assert all(rank[name].metrics is None for name in (*wanted, "broken"))


def test_another_number_of_ranks_refuses_what_is_not_whole(world, trained) -> None:
    folder = world.root / "checkpoints"
    saved = saved_name(folder / "few-torn")
    (missing,), (torn,) = trained["middle"]["missing"], trained["middle"]["torn"]
    lost = folder / "few-missing" / saved / VICTIM
    assert missing.error.startswith(f"CheckpointMisfit: {lost}: missing")
    assert torn.error.startswith(f"CheckpointMisfit: {folder / 'few-torn' / saved}: ")
    assert "could not convert it for another number of workers" in torn.error
    assert "set resources.distill.workers=2, or start over with --redo distill" in torn.error
    assert missing.steps() == torn.steps() == []


# Uploads.


def kinds(told: Told) -> list[Any]:
    """Steps by their number, checkpoints as text, in the order in which they were told."""
    return [
        event["step"] if event["event"] == "step" else f"saved {event['step']}"
        for event in told.events
        if event["event"] in ("step", "checkpoint")
    ]


def test_training_goes_on_while_a_checkpoint_is_uploaded(uploaded) -> None:
    told = uploaded[0]["late"]
    assert kinds(told) == [*range(1, 11), "saved 6"]
    assert told.metrics is not None


def test_a_kill_within_an_upload_leaves_the_checkpoint_before(uploaded, killed) -> None:
    names = [name[:13] for name in killed]
    assert names == ["00000004-0001", "00000004-0001", "00000008-0001", "inputs.json"]
    assert [name for name in killed if name.startswith("0") and name.endswith(".json")] == [
        f"{killed[0]}.json"
    ]
    told = uploaded[0]["killed"]
    assert told.first("resume")["step"] == 4
    assert told.steps() == [5, 6, 7, 8, 9, 10]
    assert told.values() == pytest.approx(uploaded[0]["late"].values()[4:], rel=1e-6)


def test_an_upload_that_fails_ends_the_training_on_all_ranks(world, uploaded) -> None:
    folder = world.root / "checkpoints" / "failing"
    for rank in uploaded:
        assert re.fullmatch(
            f"CheckpointFailed: {folder / '00000008-0001'}-[0-9a-f]+: the checkpoint was not "
            "saved: rank 1 could not upload its files: OSError: connection reset",
            rank["failing"].error,
        )
    assert [name for name in kinds(uploaded[0]["failing"]) if isinstance(name, str)] == ["saved 4"]
    assert saved_name(folder, 4)
    assert not list(folder.glob("00000008-0001-*.json"))
