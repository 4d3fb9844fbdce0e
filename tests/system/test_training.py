"""Training on real process groups: ZeRO stages, world sizes, resumes, and what is saved."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.corpora import (
    LENGTH,
    VOCAB,
    config_values,
    data_spec,
    load_plain,
    log_softmax,
    make_corpus,
    plain_cache,
    plain_logits,
    save_model,
    write_texts,
)
from tests.fixtures.ranks import Log, Told, spawn, start

STEPS = 6
# So fine that the losses can be compared with float64.
KEPT = {"method": "topk", "k": 8, "step": 0.001, "temperatures": [1.0, 2.0]}
# Two sets of draws, read in turns by epochs of 12 sequences: 1.5 steps.
DRAWN = {"method": "sample", "draws": 6, "redraws": 2}
POOL = 12
STAGES, TIES = (1, 2, 3), (True, False)
# Trainings that two workers make as one does: `accumulation` micro-batches per step and worker.
CASES: dict[str, dict[str, Any]] = {
    "tied-1": {"accumulation": 1},
    "tied-4": {"accumulation": 4},
    "untied-4": {"tied": False, "accumulation": 4},
    "ragged": {"tokens_per_step": 5 * LENGTH},
    "bfloat16": {"dtype": "bfloat16", "accumulation": 4},
}
# One worker alone holds all of everything, so most of them are made once.
ALONE = ("tied-1", "tied-4")
RESUMES = [(2, "float32"), (3, "float32"), (2, "bfloat16"), (3, "bfloat16")]


# What runs on the ranks.


def train_all(jobs: list[tuple[Any, int | None]]) -> list[Told]:
    """Trains each job, with a stop asked for in step so-and-so (None: no stop)."""
    import torch

    from trainer.training import loop
    from trainer.training.checkpoint import CheckpointMisfit
    from trainer.worker import Stopped

    worker = start()
    publish = loop.publish
    results = []
    for job, stop_at in jobs:
        log = Log(stop_at)
        told = Told(log.events)
        began = time.time()

        def spy(job: Any, built: Any, corpus: Any, worker: Any, *rest: Any, told=told) -> None:
            told.logits = engine_logits(built, corpus, worker)
            told.held_bytes = sum(
                value.numel() * value.element_size()
                for state in built.engine.optimizer.optimizer.state.values()
                for value in state.values()
                if torch.is_tensor(value)
            )
            publish(job, built, corpus, worker, *rest)

        loop.publish = spy
        try:
            told.metrics = loop.train(job, replace(worker, hooks=log.hooks(attempt=1)))
        except (Stopped, CheckpointMisfit) as error:
            told.error = f"{type(error).__name__}: {error}"
        told.seconds = time.time() - began
        results.append(told)
    return results


def engine_logits(built: Any, corpus: Any, worker: Any) -> np.ndarray:
    """The training engine's own logits [4 * seq, vocab] of the first report sequences."""
    import torch

    from trainer.losses.divergences import CrossEntropy
    from trainer.training import student
    from trainer.training.loader import make_micro_batch

    seen = []
    fused_loss = student.fused_loss

    def spy(hidden: Any, head: Any, *rest: Any) -> Any:
        seen.append(head.logits(hidden))  # inside the engine's forward: ZeRO-3 has the head here
        return fused_loss(hidden, head, *rest)

    ones = np.ones(4, np.float32)
    micro = make_micro_batch(corpus.part("report"), np.arange(4), ones, None)
    built.engine.eval()
    student.fused_loss = spy
    try:
        with torch.no_grad():
            built.engine(**micro.to(worker.device), losses={"ce": (1.0, CrossEntropy())})
    finally:
        student.fused_loss = fused_loss
    return torch.cat(seen).float().numpy()


# The trainings.


@dataclass
class World:
    """A folder with corpus, teacher and cache, and the jobs that can be made of them."""

    root: Path
    data: Any
    corpus: Any
    teacher: Path

    def job(self, name: str, *, kind: str = "llama", tied: bool = True, **distill: Any) -> Any:
        """A training into folders of its own."""
        from cluster.storage import open_store
        from trainer.spec.sections import CacheSpec, DistillSpec, StudentSpec
        from trainer.training.job import Training

        values: dict[str, Any] = {
            "losses": {"forward_kl": 0.7, "ce": 0.3},
            "temperature": 2.0,
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
            teacher=None,
            student=StudentSpec(config=config_values(kind, tied=tied), init="random"),
            distill=DistillSpec(**{**values, **distill}),
            data=self.data,
            cache_spec=CacheSpec(**KEPT),
            seed=3,
            corpus=store.sub("corpus"),
            cache=store.sub("cache"),
            checkpoints=store.sub("checkpoints", name),
            output=store.sub("students", name),
            last=store.sub("students-last", name),
        )

    def drawn_job(self, name: str, **distill: Any) -> Any:
        """The same from drawn ids, over four epochs."""
        from cluster.storage import open_store
        from trainer.spec.sections import CacheSpec

        return replace(
            self.job(name, temperature=1.0, **distill),
            data=self.data.model_copy(update={"max_tokens": POOL * LENGTH}),
            cache_spec=CacheSpec(**DRAWN),
            cache=open_store(self.root).sub("drawn"),
        )


def make_world(root: Path, caches: dict[str, dict[str, Any]], **texts: Any) -> World:
    """With the teacher's records of the whole corpus, by the caches' names."""
    from cluster.storage import open_store
    from trainer.spec.sections import CacheSpec

    data = data_spec(write_texts(root / "texts", **texts))
    store = open_store(root)
    corpus = make_corpus(store.sub("corpus"), data)
    teacher = save_model(root / "teacher", corpus.tokenizer_folder(), kind="llama", width=48)
    for name, values in caches.items():
        spec = CacheSpec(**values)
        plain_cache(store.sub(name), load_plain(teacher), corpus, spec, by_document=True)
    return World(root, data, corpus, teacher)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("training"), {"cache": KEPT, "drawn": DRAWN})


def stage_jobs(world: World, ranks: int) -> dict[str, Any]:
    """One training per ZeRO stage and case."""
    jobs = {}
    for stage in STAGES:
        for case, how in CASES.items():
            if ranks == 1 and stage != 2 and case not in ALONE:
                continue
            name = f"w{ranks}-z{stage}-{case}"
            values = {"zero_stage": stage, **how}
            if "accumulation" in how:
                values["micro_batch"] = 8 // ranks // values.pop("accumulation")
            jobs[name] = world.job(name, **values)
    name = f"w{ranks}-drawn"
    jobs[name] = world.drawn_job(name)
    once = world.drawn_job(f"{name}-once")
    jobs[f"{name}-once"] = replace(
        once, cache_spec=once.cache_spec.model_copy(update={"redraws": 1})
    )
    return jobs


def resume_jobs(world: World, suffix: str) -> dict[str, Any]:
    """The trainings that are stopped and resumed; the first also makes checkpoints on its way."""
    jobs = {}
    for stage, dtype in RESUMES:
        name = f"z{stage}-{dtype}{suffix}"
        kind = "gpt2" if (stage, dtype) == (2, "bfloat16") else "llama"  # gpt2 has dropout
        jobs[name] = world.job(
            name, kind=kind, zero_stage=stage, dtype=dtype, checkpoint_steps=1, keep_checkpoints=2
        )
    jobs[f"drawn{suffix}"] = world.drawn_job(f"drawn{suffix}")
    return jobs


@pytest.fixture(scope="module")
def two(world) -> list[dict[str, Told]]:
    """By rank, everything that is trained on two ranks from the start."""
    jobs: dict[str, tuple[Any, int | None]] = {}
    for name, job in stage_jobs(world, 2).items():
        jobs[name] = (job, None)
    for name, job in resume_jobs(world, "").items():
        jobs[name] = (job, None)
    for name, job in resume_jobs(world, "-stopped").items():
        jobs[name] = (job, 3)
    results = spawn(train_all, list(jobs.values()), world=2)
    return [dict(zip(jobs, told, strict=True)) for told in results]


@pytest.fixture(scope="module")
def stopped(world, two) -> dict[str, list[str]]:
    """Names in the checkpoint folders of the stopped trainings, before they are resumed."""
    folder = world.root / "checkpoints"
    return {
        f"z{stage}-{dtype}": sorted(
            path.name for path in (folder / f"z{stage}-{dtype}-stopped").iterdir()
        )
        for stage, dtype in RESUMES
    }


@pytest.fixture(scope="module")
def one(world) -> dict[str, Told]:
    """What is trained on one rank."""
    jobs = stage_jobs(world, 1)
    (results,) = spawn(train_all, [(job, None) for job in jobs.values()], world=1)
    return dict(zip(jobs, results, strict=True))


@pytest.fixture(scope="module")
def resumed(world, stopped) -> list[dict[str, Told]]:
    """The stopped trainings, continued by new processes; a second time, which finds them done."""
    jobs = resume_jobs(world, "-stopped")
    jobs["again"] = jobs["z2-float32-stopped"]
    results = spawn(train_all, [(job, None) for job in jobs.values()], world=2)
    return [dict(zip(jobs, told, strict=True)) for told in results]


# Stages and world sizes.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_have_the_losses_of_one(one, two, stage, case) -> None:
    alone, together = one[f"w1-z2-{case}"], two[0][f"w2-z{stage}-{case}"]
    assert_same_training(together, alone, 1e-4 if case != "bfloat16" else 5e-3)


@pytest.mark.parametrize("case", ALONE)
@pytest.mark.parametrize("stage", STAGES)
def test_neither_stage_nor_accumulation_change_the_losses(one, two, stage, case) -> None:
    """The engine divides by the micro-batches of a step, its reduction by the ranks."""
    for told in (one[f"w1-z{stage}-{case}"], two[0][f"w2-z{stage}-{case}"]):
        assert_same_training(told, one["w1-z2-tied-1"], 1e-4)


def assert_same_training(told: Told, other: Told, tolerance: float) -> None:
    assert told.steps() == other.steps() == list(range(1, STEPS + 1))
    np.testing.assert_allclose(told.values(), other.values(), rtol=tolerance)
    assert other.values()[-1] < other.values()[0] - 0.1  # it learns: equality is of something
    norms = [[e["grad_norm"] for e in t.events if e["event"] == "step"] for t in (told, other)]
    np.testing.assert_allclose(*norms, rtol=10 * tolerance)
    for name in ("select_ce", "select_forward_kl"):
        assert told.metrics[name] == pytest.approx(other.metrics[name], rel=10 * tolerance)


def test_bfloat16_learns_what_float32_does(one) -> None:
    low, high = one["w1-z2-bfloat16"], one["w1-z2-tied-4"]
    np.testing.assert_allclose(low.values(), high.values(), rtol=0.02)
    assert low.losses() != high.losses()


@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_holds_its_share_of_the_optimizer(two, one, stage) -> None:
    parameters = two[0]["w2-z2-untied-4"].metrics["parameters"]
    whole = 2 * 4 * parameters  # Adam's two float32 moments
    assert one["w1-z2-untied-4"].held_bytes == pytest.approx(whole, rel=0.02)
    shares = [told[f"w2-z{stage}-untied-4"].held_bytes for told in two]
    assert shares == pytest.approx([whole / 2, whole / 2], rel=0.05)


# What the loss is of.


def expected_loss(
    world: World, logits: np.ndarray, numbers: np.ndarray, part: str
) -> dict[str, float]:
    """Means over the loss tokens, straight from the definitions, in float64.

    Forward KL at temperature 2, times 4, over the teacher's 8 most likely ids and the rest.
    """
    batch = world.corpus.part(part).batch(numbers)
    teacher = plain_logits(load_plain(world.teacher), batch, by_document=True)
    mask = batch.loss_mask == 1
    log_q, log_p = log_softmax(logits / 2)[mask], log_softmax(teacher / 2)[mask]
    kept = np.argsort(-log_p, axis=-1)[:, :8]
    p, q = (np.take_along_axis(np.exp(x), kept, axis=-1) for x in (log_p, log_q))
    p, q = (np.concatenate([x, 1 - x.sum(axis=-1, keepdims=True)], axis=-1) for x in (p, q))
    labels = batch.input_ids[:, 1:][mask[:, :-1]]
    true = log_softmax(logits)[mask][np.arange(len(labels)), labels]
    return {"forward_kl": 4 * float((p * np.log(p / q)).sum(axis=-1).mean()), "ce": -true.mean()}


def test_the_first_loss_is_the_mean_over_the_global_batch(world, one, two) -> None:
    """Averaged per token, not per micro-batch: micro-batches hold unequally many loss tokens."""
    job = world.job("unused")
    model = untrained(world, job)
    numbers = job.schedule(world.corpus).step_indices(0)
    batch = world.corpus.part("train").batch(numbers)
    assert len(set(batch.loss_mask.sum(axis=1))) > 1
    truth = expected_loss(
        world, plain_logits(model.eval(), batch, by_document=True), numbers, "train"
    )
    stages = [two[0][f"w2-z{stage}-{case}"] for stage in STAGES for case in ALONE]
    for told in (*(one[f"w1-z2-{case}"] for case in ALONE), *stages):
        step = told.first("step")
        assert step["ce"] == pytest.approx(truth["ce"], rel=1e-5)
        assert step["forward_kl"] == pytest.approx(truth["forward_kl"], rel=2e-3)  # rounded records
        assert step["loss"] == pytest.approx(0.7 * step["forward_kl"] + 0.3 * step["ce"], rel=1e-6)


def test_drawn_ids_are_read_set_by_set(world, one, two) -> None:
    """An epoch ends within step 2: from there on the second set is read, on one rank and on two.

    The first loss is told from the draws themselves.
    """
    alone, together = one["w1-drawn"], two[0]["w2-drawn"]
    np.testing.assert_allclose(together.values(), alone.values(), rtol=1e-4)
    job = world.drawn_job("unused")
    schedule = job.schedule(world.corpus)
    assert [sorted(set(schedule.step_epochs(s).tolist())) for s in range(STEPS)] == [
        [0], [0, 1], [1], [2], [2, 3], [3],
    ]  # fmt: skip
    truth = first_loss_of_draws(world, job, schedule.step_indices(0))
    assert alone.first("step")["forward_kl"] == pytest.approx(truth, rel=1e-5)
    once = one["w1-drawn-once"]
    assert once.losses()[0] == alone.losses()[0] and once.losses()[1] != alone.losses()[1]


def first_loss_of_draws(world: World, job: Any, numbers: np.ndarray) -> float:
    """KL(share of the draws || untrained student), mean over the loss tokens, in float64."""
    from trainer.logits.reader import CacheReader

    batch = world.corpus.part("train").batch(numbers)
    log_q = log_softmax(plain_logits(untrained(world, job).eval(), batch, by_document=True))
    reader, total = CacheReader(job.cache, "train"), 0.0
    for key, rows, mask in zip(batch.keys, log_q, batch.loss_mask, strict=True):
        found = reader.read(key.tobytes())
        p = np.exp(found.log_probs.astype(np.float64))
        kept = np.take_along_axis(rows, found.ids, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(p > 0, p * (np.log(p) - kept), 0.0).sum(axis=1)
        total += float((values * mask).sum())
    return total / float(batch.loss_mask.sum())


def untrained(world: World, job: Any) -> Any:
    """The student as its training starts from it."""
    import torch

    from trainer.corpus.tokenizer import load_tokenizer
    from trainer.models.load import build_model, new_config

    tokenizer = load_tokenizer(world.corpus.tokenizer_folder())
    config = new_config("student.config", job.student.config, tokenizer, LENGTH)
    return build_model(folder=None, config=config, init="random", dtype=torch.float32, seed=3)


def test_the_loss_on_select_is_a_mean_over_tokens(world, one) -> None:
    """An evaluation loss a thousand times too large: a sum that nobody divided."""
    part = world.corpus.part("select")
    numbers = np.arange(len(part))
    student = load_plain(world.root / "students" / "w1-z2-tied-4")
    logits = plain_logits(student, part.batch(numbers), by_document=True)
    truth = expected_loss(world, logits, numbers, "select")
    metrics = one["w1-z2-tied-4"].metrics
    assert metrics["select_ce"] == pytest.approx(truth["ce"], rel=1e-4)
    assert metrics["select_perplexity"] == pytest.approx(np.exp(truth["ce"]), rel=1e-3)


# The student that is saved.

LOADER = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not {"trainer", "jobs", "cluster", "deepspeed"} & set(sys.modules)
batch, out, *folders = sys.argv[1:]
batch, result, logits = np.load(batch), {}, {}
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
    result[folder] = {key: [str(item) for item in value] for key, value in info.items()}
    result[folder]["dtype"] = str(model.dtype)
    embeddings = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    result[folder]["tied"] = embeddings[0] is embeddings[1]
    with torch.no_grad():
        ids, positions = (torch.from_numpy(batch[name]) for name in ("ids", "positions"))
        output = model.float().eval()(input_ids=ids, position_ids=positions, use_cache=False)
    logits[folder] = output.logits.flatten(0, 1).numpy()
np.savez(out, **{str(i): logits[folder] for i, folder in enumerate(folders)})
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def loaded(world, two, resumed) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """What transformers alone, in a process that knows nothing of this project, reads and says."""
    names = [f"w2-z{stage}-{tie}-4" for stage in STAGES for tie in ("tied", "untied")]
    names.append("z2-bfloat16")
    report = world.corpus.part("report").batch(np.arange(4))
    np.savez(world.root / "ids.npz", ids=report.input_ids, positions=report.position_ids)
    folders = [str(world.root / "students" / name) for name in names]
    out = world.root / "logits.npz"
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADER, str(world.root / "ids.npz"), str(out), *folders],
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout.splitlines()[-1])
    logits = np.load(out)
    return {
        name: (info[folder], logits[str(i)])
        for i, (name, folder) in enumerate(zip(names, folders, strict=True))
    }


@pytest.mark.parametrize("tied", TIES)
@pytest.mark.parametrize("stage", STAGES)
def test_transformers_alone_loads_the_student_that_was_trained(loaded, two, stage, tied) -> None:
    name = f"w2-z{stage}-{'tied' if tied else 'untied'}-4"
    info, logits = loaded[name]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert info.get(kind, []) == [], kind
    assert info["dtype"] == "torch.float32"
    assert info["tied"] == tied
    assert logits.shape == (4 * LENGTH, VOCAB)
    assert np.abs(logits).max() > 0.5
    for rank in two:
        np.testing.assert_allclose(rank[name].logits, logits, atol=1e-5)


def test_a_student_in_bfloat16_is_saved_as_such(loaded, two) -> None:
    info, logits = loaded["z2-bfloat16"]
    assert info["dtype"] == "torch.bfloat16" and not info["missing_keys"]
    np.testing.assert_allclose(two[0]["z2-bfloat16"].logits, logits, atol=0.05)


def test_only_safetensors_are_in_the_folder(world, two) -> None:
    names = {path.name for path in (world.root / "students" / "w2-z3-tied-4").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith((".pt", ".bin", ".pkl"))]


def test_names_of_a_wrapper_are_no_names_of_a_student(world, tmp_path) -> None:
    from trainer.corpus.tokenizer import load_tokenizer
    from trainer.training.save_student import save_student

    folder = world.teacher
    model, tokenizer = load_plain(folder), load_tokenizer(folder)
    state = {name: value.detach() for name, value in model.named_parameters()}
    for prefix in ("module.", "model."):
        wrapped = {prefix + name: value for name, value in state.items()}
        with pytest.raises(ValueError, match="unexpected"):
            save_student(model.config, wrapped, tokenizer, tmp_path)
    name = next(iter(state))
    with pytest.raises(ValueError, match="without"):
        save_student(
            model.config, {k: v for k, v in state.items() if k != name}, tokenizer, tmp_path
        )
    assert not list(tmp_path.iterdir())


# Stop and resume.


@pytest.mark.parametrize("name", [f"z{stage}-{dtype}" for stage, dtype in RESUMES] + ["drawn"])
def test_a_resumed_training_repeats_the_undisturbed_one_to_the_last_bit(two, resumed, name) -> None:
    whole, head, tail = two[0][name], two[0][f"{name}-stopped"], resumed[0][f"{name}-stopped"]
    assert head.error.startswith("Stopped:") and head.metrics is None
    assert tail.first("resume")["step"] == 3
    assert len(set(tail.first("resume")["pids"])) == 2
    assert [*head.steps(), *tail.steps()] == whole.steps() == [1, 2, 3, 4, 5, 6]
    assert [*head.losses(), *tail.losses()] == whole.losses()
    assert len(set(whole.losses())) == STEPS
    for key in ("select_ce", "select_forward_kl"):
        assert tail.metrics[key].hex() == whole.metrics[key].hex()
    assert tail.metrics["tokens"] == whole.metrics["tokens"]
    np.testing.assert_array_equal(tail.logits, whole.logits)


def test_waits_for_the_loader_are_told(two, resumed) -> None:
    """Per step, and in the end as a mean without the first step of the process."""
    for told in (two[0]["z2-float32"], resumed[0]["z2-float32-stopped"]):
        waits = [event["loader_wait_ms"] for event in told.events if event["event"] == "step"]
        assert told.metrics["first_wait_ms"] == waits[0] >= 0
        assert told.metrics["loader_wait_ms"] == pytest.approx(np.mean(waits[1:]))


def test_only_rank_zero_speaks(two) -> None:
    assert all(not told.events for told in two[1].values())


def test_checkpoints_come_as_asked_for_and_old_ones_go(world, two, stopped, resumed) -> None:
    whole = two[0]["z2-float32"]
    assert [e["step"] for e in whole.events if e["event"] == "checkpoint"] == [1, 2, 3, 4, 5]
    for names in stopped.values():
        assert [name[:13] for name in names] == [
            "00000002-0001", "00000002-0001", "00000003-0001", "00000003-0001", "inputs.json",
        ]  # fmt: skip
    for name in ("z2-float32", "z3-bfloat16-stopped"):
        left = {path.name for path in (world.root / "checkpoints" / name).iterdir()}
        assert left == {"done", "inputs.json"}


def test_a_training_that_is_done_is_not_done_again(resumed) -> None:
    again, first = (resumed[0][name] for name in ("again", "z2-float32-stopped"))
    assert again.events == [] and again.metrics == first.metrics
    assert again.metrics["seconds"] > 0
