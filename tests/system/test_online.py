"""A teacher beside the student, whole or shared out by ZeRO-3, on real process groups."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.fixtures.corpora import (
    LENGTH,
    VOCAB,
    config_values,
    data_spec,
    documents_of,
    load_plain,
    log_softmax,
    make_corpus,
    plain_cache,
    plain_logits,
    save_model,
    write_texts,
)
from tests.fixtures.ranks import Log, Told, spawn, start

STEPS = 4
# The teacher has more rows than the tokenizer has ids; the student has just as many.
ROWS = 336
# All ids, as finely as a cache keeps them: nothing is in the tail.
WHOLE = {"method": "topk", "k": VOCAB, "step": 0.001}
PAIRS = [(0, 1), (1, 1), (1, 2)]
RESUMES = [(2, "none"), (3, "zero3")]


# What runs on the ranks.


@dataclass
class Ran(Told):
    """What one rank has to say of one training, and of the teacher in it.

    held: bytes of the teacher on this rank before each signal, inside of it, and after it. student:
    bytes of the student's own partitions here, and of all of it. kept: how much was left of each
    signal after it. traces: what the training left in the process.
    """

    held: list[int] = field(default_factory=list)
    student: tuple[int, int] = (0, 0)
    kept: list[int] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)


def train_all(
    jobs: list[tuple[Any, int | None, float | None]],
) -> list[tuple[Told, dict[str, Any]]]:
    """Trains each job: (job, question at which a stop is asked for, bytes of memory per rank)."""
    from contextlib import contextmanager

    from trainer.teacher import teacher as engine
    from trainer.training import loop
    from trainer.training.signals import OnlineTeacher
    from trainer.worker import Stopped

    worker = start()
    signal, publish, memory_of = OnlineTeacher.signal, loop.publish, engine.memory_of
    results = []
    for job, stop_at, memory in jobs:
        log = Log(stop_at)
        told = Told(log.events)
        facts: dict[str, Any] = {"held": [], "kept": []}
        engine.memory_of = (lambda worker, memory=memory: memory) if memory else memory_of

        @contextmanager
        def spied(self: Any, inputs: Any, facts: dict[str, Any] = facts) -> Any:
            facts["held"].append(self.held())
            with signal(self, inputs) as more:
                facts["held"].append(self.held())
                yield more
            facts["held"].append(self.held())
            facts["kept"].append(len(more))

        def spy(job: Any, built: Any, *rest: Any, facts: dict[str, Any] = facts) -> None:
            parameters = list(built.engine.module.parameters())
            facts["student"] = (
                sum(getattr(p, "ds_tensor", p).nbytes for p in parameters),
                sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters),
            )
            publish(job, built, *rest)

        OnlineTeacher.signal, loop.publish = spied, spy
        try:
            told.metrics = loop.train(job, replace(worker, hooks=log.hooks(attempt=1)))
        except (Stopped, ValueError) as error:
            told.error = f"{type(error).__name__}: {error}"
        facts["traces"] = traces()
        results.append((told, facts))
    return results


def traces() -> list[str]:
    """What DeepSpeed or transformers have left in this process that the next model would meet."""
    from deepspeed.runtime.zero import parameter_offload, partition_parameters, utils
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from torch import nn
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from trainer.teacher.sharded import _Root

    plain = nn.Linear(2, 2)
    own = coordinator.assert_ints_same_as_other_ranks is utils.assert_ints_same_as_other_ranks
    found = {
        "check": not own,
        "teacher": any(isinstance(m, _Root) for m in parameter_offload.FWD_MODULE_STACK),
        "init": partition_parameters.zero_init_context != 0,
        "partitioned": hasattr(plain.weight, "ds_id"),
        "transformers": is_deepspeed_zero3_enabled(),
    }
    return [name for name, there in found.items() if there]


def read(jobs: Iterable[str], results: list[Any]) -> list[dict[str, Ran]]:
    """What the ranks say, by rank and training."""
    return [
        {
            name: Ran(**vars(told), **facts)
            for name, (told, facts) in zip(jobs, of_rank, strict=True)
        }
        for of_rank in results
    ]


def on_two_nodes(
    jobs: list[tuple[Any, int | None, float | None]],
) -> list[tuple[Told, dict[str, Any]]]:
    """The same on two pretended nodes of two ranks each."""
    os.environ["NODE_RANK"] = str(int(os.environ["RANK"]) // 2)
    return train_all(jobs)


# The trainings.


@dataclass
class World:
    """A folder with corpus, teachers, and a cache of the whole distributions of one."""

    root: Path
    data: Any
    corpus: Any

    def job(
        self,
        name: str,
        *,
        teacher: str = "teacher",
        sharding: str = "none",
        cache: bool = False,
        student: dict[str, Any] | None = None,
        **distill: Any,
    ) -> Any:
        """A training into folders of its own; the losses count the teacher alone."""
        from cluster.storage import open_store
        from trainer.spec.sections import CacheSpec, DistillSpec, StudentSpec, TeacherSpec
        from trainer.training.job import Training

        values: dict[str, Any] = {
            "mode": "online",
            "losses": {"forward_kl": 1.0},
            "dtype": "float32",
            "steps": STEPS,
            "tokens_per_step": 8 * LENGTH,
            "micro_batch": 2,
            "learning_rate": 5e-3,
            "evaluate_steps": None,
            "activation_checkpointing": False,
        }
        store = open_store(self.root)
        return Training(
            stage="distill",
            teacher=TeacherSpec(model=str(self.root / teacher), dtype="float32", sharding=sharding),
            student=StudentSpec(**student or {"config": config_values(), "init": "random"}),
            distill=DistillSpec(**{**values, **distill}),
            data=self.data,
            cache_spec=CacheSpec(**WHOLE),
            seed=3,
            corpus=store.sub("corpus"),
            cache=store.sub("cache") if cache else None,
            checkpoints=store.sub("checkpoints", name),
            output=store.sub("students", name),
            last=store.sub("last", name),
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    import torch

    from cluster.storage import open_store
    from trainer.spec.sections import CacheSpec

    root = tmp_path_factory.mktemp("online")
    data = data_spec(write_texts(root / "texts"))
    store = open_store(root)
    corpus = make_corpus(store.sub("corpus"), data)
    for name, width, tied in (("teacher", 48, False), ("narrow", 32, True)):
        folder = save_model(root / name, corpus.tokenizer_folder(), width=width, tied=tied)
    model = load_plain(root / "teacher")
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    with torch.no_grad():  # were they counted, they would have most of the probability
        model.get_output_embeddings().weight[VOCAB:].normal_(std=3)
    model.save_pretrained(root / "teacher")
    assert folder == root / "narrow"
    cut = teacher_of(root)
    plain_cache(store.sub("cache"), cut, corpus, CacheSpec(**WHOLE), by_document=True)
    return World(root, data, corpus)


def teacher_of(root: Path) -> Any:
    """The teacher's logits of ids that exist, as `plain_logits` calls a model."""
    model = load_plain(root / "teacher")
    assert model.get_output_embeddings().weight.shape[0] == ROWS
    return lambda ids: SimpleNamespace(logits=model(ids).logits[..., :VOCAB])


def hidden(metric: str = "mse", **more: Any) -> dict[str, Any]:
    return {"forward_kl": 0.5, "hidden": {"weight": 2.0, "metric": metric, **more}}


def jobs_of(world: World) -> dict[str, Any]:
    """What is trained on two ranks from the start."""
    jobs: dict[str, Any] = {
        "warm": world.job("warm", losses={"forward_kl": 0.7, "ce": 0.3}, temperature=2.0),
        "online": world.job("online", cache=True, steps=6),
        "cached": world.job("cached", cache=True, mode="cached", steps=6),
    }
    for stage in (2, 3):
        for sharding in ("none", "zero3"):
            name = f"z{stage}-{sharding}"
            jobs[name] = world.job(
                name, losses=hidden(layers=PAIRS[:2]), zero_stage=stage, sharding=sharding
            )
    jobs["narrow-zero3"] = world.job(
        "narrow-zero3", teacher="narrow", sharding="zero3", zero_stage=3, steps=2
    )
    jobs["narrow-none"] = world.job("narrow-none", teacher="narrow", steps=2)
    for metric in ("mse", "cosine"):
        for teacher in ("teacher", "narrow"):
            name = f"{metric}-{teacher}"
            jobs[name] = world.job(name, teacher=teacher, losses=hidden(metric), steps=12)
    jobs["recomputed"] = world.job(
        "recomputed",
        losses=hidden(layers=PAIRS[:2]),
        zero_stage=3,
        sharding="zero3",
        activation_checkpointing=True,
    )
    jobs["alone"] = world.job("alone", losses={"hidden": 1.0})
    jobs["lora"] = world.job(
        "lora",
        losses=hidden(),
        zero_stage=3,
        student={"model": str(world.root / "narrow"), "lora": {"r": 4}},
    )
    return jobs


def resume_jobs(world: World, suffix: str) -> dict[str, Any]:
    return {
        f"resume-{stage}-{sharding}{suffix}": world.job(
            f"resume-{stage}-{sharding}{suffix}",
            losses=hidden(),
            zero_stage=stage,
            sharding=sharding,
        )
        for stage, sharding in RESUMES
    }


@pytest.fixture(scope="module")
def two(world) -> list[dict[str, Ran]]:
    """By rank, everything that is trained on two ranks from the start."""
    jobs: dict[str, Any] = {name: (job, None, None) for name, job in jobs_of(world).items()}
    for name, job in resume_jobs(world, "").items():
        jobs[name] = (job, None, None)
    for name, job in resume_jobs(world, "-stopped").items():
        jobs[name] = (job, 3, None)
    # What the student's training leaves of it holds all of the teacher with ZeRO 3 alone.
    jobs["auto"] = (world.job("auto", sharding="auto"), None, 8.9e5)
    jobs["auto-3"] = (world.job("auto-3", sharding="auto", zero_stage=3), None, 8.9e5)
    jobs["full"] = (world.job("full", sharding="auto"), None, 5e5)
    return read(jobs, spawn(train_all, list(jobs.values()), world=2))


@pytest.fixture(scope="module")
def resumed(world, two) -> list[dict[str, Ran]]:
    """The stopped trainings, continued by new processes."""
    jobs = resume_jobs(world, "-stopped")
    return read(jobs, spawn(train_all, [(job, None, None) for job in jobs.values()], world=2))


# What the loss is of.


def first_batch(world: World, job: Any) -> Any:
    numbers = job.schedule(world.corpus).step_indices(0)
    return world.corpus.part("train").batch(numbers)


def untrained(world: World) -> Any:
    """The student as its training starts from it."""
    import torch

    from trainer.corpus.tokenizer import load_tokenizer
    from trainer.models.load import build_model, new_config

    tokenizer = load_tokenizer(world.corpus.tokenizer_folder())
    config = new_config("student.config", config_values(), tokenizer, LENGTH)
    model = build_model(folder=None, config=config, init="random", dtype=torch.float32, seed=3)
    return model.eval()


def plain_states(model: Any, batch: Any, layer: int) -> np.ndarray:
    """Float64 states [tokens, width] after a layer, a forward pass for each document alone."""
    import torch

    seen: list[Any] = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda module, given, output: seen.append(output[0].double())
    )
    for ids, positions in zip(batch.input_ids, batch.position_ids, strict=True):
        for a, b in documents_of(positions):
            with torch.no_grad():
                model(torch.from_numpy(ids[None, a:b]))
    handle.remove()
    return torch.cat(seen).numpy()


@pytest.mark.parametrize(("name", "temperature"), [("warm", 2.0), ("online", 1.0)])
def test_the_first_loss_is_the_kl_of_the_whole_vocabulary(world, two, name, temperature) -> None:
    """Rows that are no ids count on neither side; documents do not see each other."""
    job = world.job("unused")
    batch = first_batch(world, job)
    assert len(set(batch.loss_mask.sum(axis=1))) > 1
    mask = batch.loss_mask == 1
    own, other = (
        log_softmax(plain_logits(model, batch, by_document=True) / temperature)[mask]
        for model in (untrained(world), teacher_of(world.root))
    )
    truth = temperature**2 * float((np.exp(other) * (other - own)).sum(axis=-1).mean())
    assert two[0][name].first("step")["forward_kl"] == pytest.approx(truth, rel=2e-6)


def test_online_is_what_a_cache_of_all_ids_is(two) -> None:
    """Step for step, but for the rounding of the cache."""
    online, cached = two[0]["online"], two[0]["cached"]
    assert online.held and not cached.held  # no teacher was loaded for the second
    np.testing.assert_allclose(online.values(), cached.values(), rtol=2e-4)
    assert online.values()[-1] < online.values()[0] - 0.05
    for name in ("select_ce", "select_forward_kl"):
        assert online.metrics[name] == pytest.approx(cached.metrics[name], rel=1e-4)


def test_without_a_cache_the_teacher_itself_is_asked_on_select(world, two) -> None:
    """At temperature 1, whatever that of the loss."""
    part = world.corpus.part("select")
    batch = part.batch(np.arange(len(part)))
    mask = batch.loss_mask == 1
    own, other = (
        log_softmax(plain_logits(model, batch, by_document=True))[mask]
        for model in (load_plain(world.root / "students" / "warm"), teacher_of(world.root))
    )
    truth = float((np.exp(other) * (other - own)).sum(axis=-1).mean())
    assert two[0]["warm"].metrics["select_forward_kl"] == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_shared_out_teacher_teaches_the_same(two, stage) -> None:
    whole, shared = two[0]["z2-none"], two[0][f"z{stage}-zero3"]
    np.testing.assert_allclose(shared.values(), whole.values(), rtol=1e-5)
    np.testing.assert_allclose(two[0]["z3-none"].values(), whole.values(), rtol=1e-5)
    tied, apart = two[0]["narrow-zero3"], two[0]["narrow-none"]
    np.testing.assert_allclose(tied.values(), apart.values(), rtol=1e-5)


def test_each_rank_holds_half_of_teacher_and_student(world, two) -> None:
    whole = load_plain(world.root / "teacher")
    size = sum(p.nbytes for p in whole.parameters())
    head = whole.get_output_embeddings().weight.nbytes
    for rank in two:
        assert set(rank["z3-none"].held) == {size}
        own, total = rank["z3-zero3"].student
        assert own == pytest.approx(total / 2, rel=0.01)
        held = rank["z3-zero3"].held
        before, inside, after = held[0::3], held[1::3], held[2::3]
        assert set(before) == set(after) and before[0] == pytest.approx(size / 2, rel=0.01)
        # Inside the head is whole, and nothing else is.
        assert set(inside) == {before[0] + head}


def test_nothing_of_a_signal_or_of_an_engine_stays(two) -> None:
    for rank in two:
        for name, ran in rank.items():
            assert not any(ran.kept), name
            assert ran.traces == [], name


def test_auto_leaves_room_for_the_student(two) -> None:
    """296 kB of teacher are far below 60 % of 890 kB; with 404 kB of training states (ZeRO 2) less
    than 296 kB of that are left, with 387 kB (ZeRO 3, whose largest layer is gathered) more."""
    assert two[0]["auto"].first("teacher")["sharding"] == "zero3"
    assert two[0]["auto-3"].first("teacher")["sharding"] == "none"
    assert two[0]["z2-none"].first("teacher")["sharding"] == "none"
    np.testing.assert_allclose(two[0]["auto"].values(), two[0]["auto-3"].values(), rtol=1e-5)
    for rank in two:
        error = rank["full"].error
        assert error.startswith("ValueError: teacher.model: ") and "\n" not in error
        assert "the student's training takes" in error and "resources.distill" in error


# Hidden states.


def first_distance(world: World, metric: str, teacher: str) -> float:
    """Mean over the loss tokens and the pairs, in float64."""
    import torch

    batch = first_batch(world, world.job("unused"))
    mask = batch.loss_mask.reshape(-1) == 1
    other = load_plain(world.root / teacher)
    draw = torch.Generator().manual_seed(3)
    values = []
    for layer in (0, 1):  # two layers each: auto pairs them in order
        own = plain_states(untrained(world), batch, layer)[mask]
        aim = plain_states(other, batch, layer)[mask]
        if teacher == "teacher":
            weight = torch.randn((48, 32), generator=draw) * 32**-0.5
            own = own @ weight.double().numpy().T
        if metric == "mse":
            values.append(((own - aim) ** 2).mean(axis=1) / (aim**2).mean(axis=1))
        else:
            sizes = np.linalg.norm(own, axis=1) * np.linalg.norm(aim, axis=1)
            values.append(1 - (own * aim).sum(axis=1) / sizes)
    return float(np.mean(values))


@pytest.mark.parametrize("teacher", ["teacher", "narrow"])
@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_hidden_states_are_drawn_to_the_teachers(world, two, metric, teacher) -> None:
    ran = two[0][f"{metric}-{teacher}"]
    step = ran.first("step")
    assert step["hidden"] == pytest.approx(first_distance(world, metric, teacher), rel=1e-5)
    assert step["loss"] == pytest.approx(0.5 * step["forward_kl"] + 2 * step["hidden"], rel=1e-6)
    values = [event["hidden"] for event in ran.events if event["event"] == "step"]
    assert values[-1] < values[0] - (0.01 if metric == "mse" else 0.1)


def test_recomputed_activations_give_the_same_losses(two) -> None:
    assert two[0]["recomputed"].losses() == two[0]["z3-zero3"].losses()


def test_hidden_states_alone_can_be_learnt(two) -> None:
    values = two[0]["alone"].values()
    assert len(values) == STEPS and values[-1] < values[0] - 0.002


def test_what_the_widths_need_is_no_part_of_the_student(world, two) -> None:
    for name in ("mse-teacher", "z3-zero3", "lora"):
        model = load_plain(world.root / "students" / name)
        assert model.config.hidden_size == 32
        assert not [key for key in model.state_dict() if "maps" in key or "hidden" in key]


def test_adapters_learn_from_a_teacher_beside_them(two) -> None:
    values = two[0]["lora"].values()
    assert len(values) == STEPS and values[-1] < values[0]


@pytest.mark.parametrize(("stage", "sharding"), RESUMES)
def test_a_resumed_training_repeats_the_undisturbed_one_to_the_last_bit(
    two, resumed, stage, sharding
) -> None:
    """The maps between the widths are in the checkpoint; the teacher is not, and stays."""
    name = f"resume-{stage}-{sharding}"
    whole, head, tail = two[0][name], two[0][f"{name}-stopped"], resumed[0][f"{name}-stopped"]
    assert head.error.startswith("Stopped:") and tail.first("resume")["step"] == 3
    assert [*head.losses(), *tail.losses()] == whole.losses()
    for key in ("select_ce", "select_forward_kl"):
        assert tail.metrics[key].hex() == whole.metrics[key].hex()


def test_groups_of_a_node_share_a_teacher(world, two) -> None:
    """The student is shared out over all ranks, each node has a copy of the teacher."""
    job = world.job("nodes", losses=hidden(layers=PAIRS[:2]), zero_stage=3, sharding="zero3")
    ranks = read(["nodes"], spawn(on_two_nodes, [(job, None, None)], world=4))
    first = ranks[0]["nodes"]
    assert first.first("teacher")["groups"] == [[0, 1], [2, 3]]
    np.testing.assert_allclose(first.values(), two[0]["z2-none"].values(), rtol=1e-5)
    assert all(ran["nodes"].held == first.held for ran in ranks)
