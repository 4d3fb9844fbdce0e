"""What happens between the steps: evaluations, the best weights, a loss that is no number."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.corpora import LENGTH, load_plain, log_softmax, plain_logits, save_model
from tests.fixtures.ranks import Log, Told, spawn, start
from tests.system.test_training import KEPT, World, make_world

# A pool so small, and a rate so high, that the student knows it by heart before the end.
STEPS, EVERY, POOL = 12, 2, 4
OVERFIT = {
    "losses": {"ce": 1.0},
    "steps": STEPS,
    "evaluate_steps": EVERY,
    "learning_rate": 3e-2,
    "schedule": "constant",
    "warmup_ratio": 0.0,
}
CHANGING = {
    "forward_kl": {"weight": {"start": 1.0, "end": 0.0, "until": 0.5}},
    "ce": {"weight": {"start": 0.2, "end": 1.0, "shape": "cosine"}},
}
RATE = 5e-3
# Checkpoint every so many steps, killed in a step: with the best in the newest checkpoint, and not.
KILLED = {"killed": (3, 10), "killed-early": (3, 6)}


# What runs on the ranks.


def train_all(jobs: list[tuple[Any, int | None, int | None]]) -> list[Told]:
    """Trains each job: with a stop asked for in one step, killed in another (None: neither)."""
    from trainer.training import loop
    from trainer.worker import Stopped

    worker = start()
    real, often = loop._Run._step, loop.BETWEEN_SECONDS
    results = []
    for job, stop_at, kill_at in jobs:
        log = Log(stop_at)
        told = Told(log.events)

        def step(run: Any, step: Any, *rest: Any, kill_at=kill_at) -> Any:
            if step.number + 1 == kill_at:
                run._finish_save()
                raise RuntimeError("killed")
            return real(run, step, *rest)

        loop._Run._step = step
        loop.BETWEEN_SECONDS = 0.0 if job.checkpoints.url.endswith("-between") else often
        try:
            told.metrics = loop.train(job, replace(worker, hooks=log.hooks(attempt=1)))
        except (Stopped, FloatingPointError, RuntimeError) as error:
            told.error = f"{type(error).__name__}: {error}"
        results.append(told)
    return results


# The trainings.


def overfit_job(world: World, name: str, **distill: Any) -> Any:
    job = world.job(name, **{**OVERFIT, **distill})
    return replace(job, data=job.data.model_copy(update={"max_tokens": POOL * LENGTH}))


def online_job(world: World, name: str, **changes: Any) -> Any:
    """With the teacher beside the student."""
    from trainer.spec.sections import TeacherSpec

    losses = {"forward_kl": 0.7, "ce": 0.3, "hidden": 0.1}
    job = world.job(name, mode="online", losses=losses, temperature=1.0, steps=3)
    teacher = TeacherSpec(model=str(world.teacher), dtype="float32")
    return replace(job, teacher=teacher, **changes)


def between_job(world: World, stage: int, kind: str) -> Any:
    """Of two micro-batches per step, between which a stop is asked for too."""
    how = {"zero_stage": stage, "evaluate_steps": None, "checkpoint_steps": 4}
    return world.job(f"z{stage}-between", kind=kind, **how)


def poisoned_job(world: World, name: str) -> Any:
    """From a student one of whose embeddings is no number."""
    from trainer.spec.sections import StudentSpec

    job = world.job(name, checkpoint_steps=1, zero_stage=1)
    return replace(job, student=StudentSpec(model=str(world.root / "poisoned")))


def first_jobs(world: World) -> dict[str, tuple[Any, int | None, int | None]]:
    jobs: dict[str, tuple[Any, int | None, int | None]] = {}
    for stage, kind in ((2, "gpt2"), (3, "llama")):  # gpt2 has dropout
        for often in (None, 1):
            name = f"z{stage}-{'often' if often else 'once'}"
            how = {"zero_stage": stage, "evaluate_steps": often, "checkpoint_steps": 4}
            jobs[name] = (world.job(name, kind=kind, **how), None, None)
        jobs[f"z{stage}-between"] = (between_job(world, stage, kind), 5, None)
    jobs["best"] = (overfit_job(world, "best"), None, None)
    jobs["only-last"] = (overfit_job(world, "only-last", evaluate_steps=None), None, None)
    jobs["stopped"] = (overfit_job(world, "stopped"), STEPS - 1, None)
    for name, (every, kill_at) in KILLED.items():
        jobs[name] = (overfit_job(world, name, checkpoint_steps=every), None, kill_at)
    jobs["changing"] = (world.job("changing", losses=CHANGING, temperature=1.0), None, None)
    jobs["online"] = (online_job(world, "online", cache=None), None, None)
    jobs["online-measured"] = (online_job(world, "online-measured"), None, None)
    jobs["poisoned"] = (poisoned_job(world, "poisoned"), None, None)
    jobs["calm"] = (world.job("calm", learning_rate=RATE), None, None)
    jobs["too-fast"] = (world.job("too-fast", learning_rate=1e9, checkpoint_steps=1), None, None)
    return jobs


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    made = make_world(tmp_path_factory.mktemp("loop"), {"cache": KEPT}, documents=120)
    poison(made)
    return made


def poison(world: World) -> None:
    """Saves the teacher with its head untied, and NaN for the embedding of `bad_token`."""
    model = save_model(
        world.root / "poisoned", world.corpus.tokenizer_folder(), tied=False, kind="llama"
    )
    plain = load_plain(model)
    plain.get_input_embeddings().weight.data[bad_token(world)] = math.nan
    plain.save_pretrained(model)


def bad_token(world: World) -> int:
    """A token that the first two steps do not read, and a later one does."""
    early, later = read(world, [0, 1]), read(world, [2, 3])
    return int(min(set(later.flatten().tolist()) - set(early.flatten().tolist())))


def read(world: World, steps: list[int]) -> np.ndarray:
    schedule = world.job("unused").schedule(world.corpus)
    numbers = np.concatenate([schedule.step_indices(step) for step in steps])
    return world.corpus.part("train").batch(numbers).input_ids


@pytest.fixture(scope="module")
def first(world) -> list[dict[str, Told]]:
    jobs = first_jobs(world)
    results = spawn(train_all, list(jobs.values()), world=2)
    return [dict(zip(jobs, told, strict=True)) for told in results]


@pytest.fixture(scope="module")
def kept(world, first) -> dict[str, list[str]]:
    """What lies in the folders of the best weights, before any training is continued."""
    folders = {name: world.root / "checkpoints" / name / "best" for name in ("stopped", *KILLED)}
    return {
        name: sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        for name, folder in folders.items()
    }


@pytest.fixture(scope="module")
def spent(world, first) -> dict[str, dict[str, float]]:
    """The costs in the newest checkpoints, before any training is continued."""
    from cluster.storage import open_store
    from trainer.training.checkpoint import find_latest

    store = open_store(world.root / "checkpoints")
    found = {name: find_latest(store.sub(name)) for name in ("stopped", *KILLED)}
    return {name: latest.state for name, latest in found.items() if latest is not None}


@pytest.fixture(scope="module")
def second(world, first, kept, spent) -> list[dict[str, Told]]:
    """What was ended before its end, continued by new processes."""
    best = first[0]["best"].metrics["best_step"]
    jobs = {
        "stopped": (overfit_job(world, "stopped"), None, None),
        **{
            name: (overfit_job(world, name, checkpoint_steps=every), None, None)
            for name, (every, _) in KILLED.items()
        },
        # Undisturbed, as many steps as the best has: at a constant rate the same weights.
        "until-best": (
            overfit_job(world, "until-best", evaluate_steps=None, steps=best), None, None
        ),
        "too-fast": (world.job("too-fast", learning_rate=1e9, checkpoint_steps=1), None, None),
        "z2-between": (between_job(world, 2, "gpt2"), None, None),
        "z3-between": (between_job(world, 3, "llama"), None, None),
    }  # fmt: skip
    results = spawn(train_all, list(jobs.values()), world=2)
    return [dict(zip(jobs, told, strict=True)) for told in results]


def of_kind(told: Told, kind: str) -> list[dict[str, Any]]:
    return [event for event in told.events if event["event"] == kind]


# Evaluations.


@pytest.mark.parametrize("stage", [2, 3])
def test_evaluations_change_nothing(first, stage) -> None:
    once, often = first[0][f"z{stage}-once"], first[0][f"z{stage}-often"]
    assert once.losses() == often.losses()
    assert [e["step"] for e in of_kind(once, "evaluation")] == [6]
    assert [e["step"] for e in of_kind(often, "evaluation")] == [1, 2, 3, 4, 5, 6]
    assert of_kind(once, "evaluation")[0]["select_ce"] == often.metrics["last_select_ce"]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_training_stops_within_a_step_and_goes_on_with_all_of_it(first, second, stage) -> None:
    whole = first[0][f"z{stage}-once"]
    head, tail = (told[0][f"z{stage}-between"] for told in (first, second))
    assert head.error.startswith("Stopped") and head.steps() == [1, 2]
    assert [event["done"] for event in of_kind(head, "progress")] == [0.5, 1.5, 2.5]
    assert tail.first("resume")["step"] == 2
    assert [*head.losses(), *tail.losses()] == whole.losses()


def test_the_curve_is_of_every_so_many_steps_and_the_last(first) -> None:
    events = of_kind(first[0]["best"], "evaluation")
    assert [event["step"] for event in events] == [2, 4, 6, 8, 10, 12]
    for event in events:
        assert event["stage"] == "distill" and event["seconds"] > 0
        assert event["select_perplexity"] == pytest.approx(math.exp(event["select_ce"]))
        assert event["select_forward_kl"] > 0
    assert all(not told.events for told in first[1].values())


# The best weights.


def test_the_best_is_the_lowest_on_select(first) -> None:
    told = first[0]["best"]
    curve = {e["step"]: e["select_ce"] for e in of_kind(told, "evaluation")}
    best = min(curve, key=curve.__getitem__)
    assert EVERY < best < STEPS - EVERY  # else this test tells nothing
    assert told.metrics["best_step"] == best
    assert told.metrics["select_ce"] == curve[best]
    assert told.metrics["last_select_ce"] == curve[STEPS]


def test_a_student_with_a_teacher_is_chosen_by_its_kl_at_temperature_one(world) -> None:
    from trainer.spec.losses import LossesSpec
    from trainer.spec.sections import TeacherSpec
    from trainer.training.evaluation import choice_metric

    def chosen(losses: dict[str, Any], teacher: bool = True) -> str:
        job = world.job("unused", losses=LossesSpec.model_validate(losses))
        found = TeacherSpec(model=str(world.teacher)) if teacher else None
        return choice_metric(replace(job, teacher=found))

    assert chosen({"forward_kl": 0.1, "ce": 0.9}) == chosen({"jsd": 1.0}) == "select_forward_kl"
    assert chosen({"ce": 1.0}) == chosen({"ce": 1.0, "hidden": 1.0}) == "select_ce"
    assert chosen({"ce": 1.0}, teacher=False) == "select_ce"


def test_the_student_has_the_best_weights_and_the_last_lie_beside_it(world, first, second) -> None:
    """Both are those of trainings that were never evaluated on their way."""
    told = first[0]["best"]
    assert told.metrics["weights"] == second[0]["until-best"].metrics["weights"]
    student, last = world.root / "students" / "best", world.root / "students-last" / "best"
    only = world.root / "students" / "only-last"
    assert same_weights(last, only) and not same_weights(student, last)
    assert {path.name for path in last.iterdir()} == {path.name for path in student.iterdir()}
    part = world.corpus.part("select")
    batch = part.batch(np.arange(len(part)))
    for folder, key in ((student, "select_ce"), (last, "last_select_ce")):
        log_q = log_softmax(plain_logits(load_plain(folder), batch, by_document=True))
        truth = -np.take_along_axis(log_q[:, :-1], batch.input_ids[:, 1:, None], -1)[..., 0]
        mask = batch.loss_mask[:, :-1] == 1
        assert told.metrics[key] == pytest.approx(truth[mask].mean(), rel=1e-4)


def same_weights(one: Path, other: Path) -> bool:
    name = "model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def test_where_the_last_is_the_best_there_is_nothing_beside_it(world, first) -> None:
    metrics = first[0]["only-last"].metrics
    assert metrics["best_step"] == STEPS
    assert metrics["last_select_ce"] == metrics["select_ce"]
    assert not (world.root / "students-last" / "only-last").exists()


@pytest.mark.parametrize("how", ["stopped", *KILLED])
def test_the_best_survives(world, first, spent, second, how) -> None:
    """Stopped after it; killed after it, with the newest checkpoint from after or before it."""
    whole, head, tail = first[0]["best"].metrics, first[0][how], second[0][how]
    assert head.metrics is None
    assert head.error == "RuntimeError: killed" or head.error.startswith("Stopped")
    ignored = {"seconds", "worker_seconds", "first_wait_ms", "loader_wait_ms", "peak_bytes"}
    assert {k: v for k, v in tail.metrics.items() if k not in ignored} == {
        k: v for k, v in whole.items() if k not in ignored
    }
    assert (tail.first("resume")["step"] < whole["best_step"]) == (how == "killed-early")
    for key in ("seconds", "worker_seconds"):
        assert tail.metrics[key] > spent[how][key] > 0
    assert tail.metrics["worker_seconds"] == pytest.approx(2 * tail.metrics["seconds"])
    for folder in ("students", "students-last"):
        assert same_weights(world.root / folder / how, world.root / folder / "best")
    left = {path.name for path in (world.root / "checkpoints" / how).iterdir()}
    assert left == {"done", "inputs.json"}


def test_only_the_best_weights_that_a_checkpoint_names_are_on_storage(first, kept) -> None:
    best = f"{first[0]['best'].metrics['best_step']:08d}-0001"
    for how in ("stopped", "killed"):
        assert [name[:13] for name in kept[how]].count(best) == 2  # the weights and their JSON
        assert len(kept[how]) <= 4  # of two checkpoints
    assert best not in {name[:13] for name in kept["killed-early"]}


# Losses.


def test_a_teacher_beside_the_student_also_measures_it(first) -> None:
    """Without a cache its own distributions are compared with, else the cache's: nearly equal."""
    alone, cached = first[0]["online"], first[0]["online-measured"]
    assert alone.losses() == cached.losses() and len(alone.losses()) == 3
    for event in of_kind(alone, "step"):
        parts = 0.7 * event["forward_kl"] + 0.3 * event["ce"] + 0.1 * event["hidden"]
        assert event["hidden"] > 0 and event["loss"] == pytest.approx(parts)
    assert alone.metrics["select_ce"] == pytest.approx(cached.metrics["select_ce"], rel=1e-6)
    kl = alone.metrics["select_forward_kl"]
    assert kl == pytest.approx(cached.metrics["select_forward_kl"], rel=0.01)
    assert kl != cached.metrics["select_forward_kl"]


def test_weights_change_step_by_step(first) -> None:
    events = of_kind(first[0]["changing"], "step")
    for number, event in enumerate(events):
        kl = 1 - min(1, number / 2)  # from 1 to 0 over the first half: steps 0, 1, 2
        ce = 0.2 + 0.8 * 0.5 * (1 - math.cos(math.pi * number / 5))
        assert event["weight_forward_kl"] == pytest.approx(kl)
        assert event["weight_ce"] == pytest.approx(ce)
        assert event["loss"] == pytest.approx(kl * event["forward_kl"] + ce * event["ce"])
    assert len(events) == 6
    assert not [key for key in of_kind(first[0]["calm"], "step")[0] if key.startswith("weight_")]


def test_a_loss_that_is_no_number_ends_the_training(world, first) -> None:
    """It names the step, the sequences of the micro-batches at fault, and what is kept."""
    token = bad_token(world)
    for rank in first:
        error = rank["poisoned"].error
        assert error.startswith("FloatingPointError: distill: ") and "\n" not in error
        step = 3 if (read(world, [2]) == token).any() else 4
        assert f"forward_kl is nan, ce is nan in step {step}, in micro-batches with" in error
        assert f"the checkpoint of step {step - 1} is kept: " in error
        assert "start over with a lower distill.learning_rate (--redo distill), or look" in error
    told = first[0]["poisoned"]
    assert told.steps() == list(range(1, step))
    (event,) = of_kind(told, "diverged")
    assert sorted(event["sequences"]) == sorted(suspects(world, step - 1, token))
    assert all(key in error for key in event["sequences"][:3])
    assert event["teacher_sequences"] == []
    assert not (world.root / "students" / "poisoned").exists()
    from trainer.training.checkpoint_names import records

    names = {path.name for path in (world.root / "checkpoints" / "poisoned").iterdir()}
    assert records(names)[-1].startswith(f"{step - 1:08d}-0001-")


def suspects(world: World, step: int, token: int) -> list[str]:
    """Keys in micro-batches of 2 sequences, dealt to 2 ranks, that hold the token."""
    numbers = world.job("unused").schedule(world.corpus).step_indices(step)
    found = []
    for rank in range(2):
        mine = numbers[rank::2]
        for at in range(0, len(mine), 2):
            batch = world.corpus.part("train").batch(mine[at : at + 2])
            if (batch.input_ids == token).any():
                found += [key.tobytes().hex() for key in batch.keys]
    return found


def test_a_training_that_diverged_keeps_its_checkpoint(first, second) -> None:
    """With the same inputs it goes on from there, and ends as before."""
    head, again = first[0]["too-fast"], second[0]["too-fast"]
    step = head.steps()[-1]
    assert head.error.startswith("FloatingPointError: distill: ")
    assert "a lower distill.learning_rate (--redo distill)" in head.error
    assert "float32" not in head.error
    assert f"the checkpoint of step {step} is kept: " in head.error
    assert again.first("resume")["step"] == step and again.steps() == []
    assert again.error == head.error
