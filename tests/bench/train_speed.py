"""Tokens/s and peak memory of training, six ways, on the same models, data, batch and threads.

    python -m tests.bench.train --only speed

Each way is a process of its own on one thread. They take turns, a few steps at a time, so that a
noisy moment of the machine meets all of them; the figures are medians over the turns.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.bench.training_world import LENGTH, SEQUENCES, World, make
from tests.fixtures.ranks import environment, free_port

# name: mode, losses, cache
OURS: dict[str, tuple[str, dict[str, float], str]] = {
    "ce_fused": ("cached", {"ce": 1.0}, "sample"),
    "cached_sample": ("cached", {"forward_kl": 1.0}, "sample"),
    "cached_topk": ("cached", {"forward_kl": 1.0}, "topk"),
    "online": ("online", {"forward_kl": 1.0}, "sample"),
}
# What differs from TRL's own defaults, which are JSD with beta .5 and gradient checkpointing;
# forward KL (beta 0) costs less, and so does it without checkpointing.
TRL: dict[str, dict[str, Any]] = {
    "trl_gkd": {},
    "trl_gkd_forward_kl": {"beta": 0.0, "gradient_checkpointing": False},
}
WAYS = ("ce", *OURS, *TRL)
WARM_UP, STEPS, TURNS = 4, 6, 9
TOKENS = SEQUENCES * LENGTH


class Turns:
    """A process's side of taking turns: told after each step, it waits when its turn is over."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.seconds, self.left = pipe, [], WARM_UP
        self.base = 0

    def started(self) -> None:
        """The imports are done; what is used from here on is the training's."""
        self.base = peak_bytes()

    def step(self, seconds: float) -> None:
        """One step took so long."""
        self.seconds.append(seconds)
        self.left -= 1
        if self.left == 0:
            self.pipe.send((self.seconds, peak_bytes() - self.base))
            self.left, self.seconds = self.pipe.recv(), []
            if self.left == 0:
                raise Finished


class Finished(Exception):
    """All turns are over."""


def peak_bytes() -> int:
    """Most memory that this process has held so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def way_main(name: str, root: str, pipe: Connection, log: str) -> None:
    """A process: trains `name`'s way, turn by turn."""
    silence(log)
    from tests.fixtures.ranks import start

    turns, world = Turns(pipe), World(Path(root))
    worker = start()
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import trainer.training.loop  # noqa: F401

    try:
        if name == "ce":
            plain_cross_entropy(world, worker, turns)
        elif name in TRL:
            trl_gkd(world, turns, TRL[name])
        else:
            ours(name, world, worker, turns)
    except Finished:
        pass


def silence(log: str) -> None:
    """What libraries print goes to a file."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)


def ours(name: str, world: World, worker: Any, turns: Turns) -> None:
    """Training as `stillhouse run` does it."""
    from dataclasses import replace

    from trainer.run_task import run_task
    from trainer.worker import Hooks

    def emit(event: str, **fields: Any) -> None:
        if event == "step":
            turns.step(fields["tokens"] and TOKENS / fields["tokens_per_s"])

    mode, losses, cache = OURS[name]
    job = world.training(name, mode, losses, cache, WARM_UP + STEPS * TURNS)
    turns.started()
    run_task(job, replace(worker, hooks=Hooks(emit=emit)))


def plain_cross_entropy(world: World, worker: Any, turns: Turns) -> None:
    """The same engine around the model's own forward pass with labels: transformers' loss."""
    import deepspeed
    import torch

    from trainer.corpus.corpus import open_corpus
    from trainer.corpus.tokenizer import load_tokenizer
    from trainer.training.engine import make_optimizer, training_config
    from trainer.training.loader import make_loader, read_ahead
    from trainer.training.student import build_student

    job = world.training("ce", "cached", {"ce": 1.0}, "sample", WARM_UP + STEPS * TURNS)
    corpus = open_corpus(job.corpus)
    loader = make_loader(job, worker, corpus)
    turns.started()
    model = build_student(job, load_tokenizer(corpus.tokenizer_folder()))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, job.distill),
        config=training_config(job.distill, SEQUENCES, 1, 1),
    )
    engine.train()
    began = time.perf_counter()
    for step in read_ahead(job, loader, 0):
        (micro,) = step.micros
        labels = micro.input_ids.clone()
        output = engine(
            input_ids=micro.input_ids,
            position_ids=micro.position_ids,
            labels=labels,
            use_cache=False,
        )
        engine.backward(output.loss)
        engine.step()
        assert torch.isfinite(output.loss)
        turns.step(time.perf_counter() - began)
        began = time.perf_counter()


def trl_gkd(world: World, turns: Turns, settings: dict[str, Any]) -> None:
    """TRL's GKDTrainer on the same sequences, off-policy (lmbda=0)."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from trainer.corpus.corpus import open_corpus
    from trainer.corpus.tokenizer import load_tokenizer
    from trainer.training.student import build_student

    job = world.training("trl", "cached", {"ce": 1.0}, "sample", WARM_UP + STEPS * TURNS)
    corpus = open_corpus(job.corpus)
    tokenizer = load_tokenizer(corpus.tokenizer_folder())
    order = [job.schedule(corpus).step_indices(step) for step in range(job.distill.steps)]
    rows = [corpus.part("train").batch(step).input_ids.tolist() for step in order]
    data = Dataset.from_dict({"input_ids": [row for step in rows for row in step]})
    turns.started()

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step(time.perf_counter() - self.began)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    with tempfile.TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            model=build_student(job, tokenizer),
            teacher_model=AutoModelForCausalLM.from_pretrained(
                job_teacher(world), dtype=torch.float32
            ),
            args=GKDConfig(
                output_dir=folder,
                lmbda=0.0,
                temperature=1.0,
                per_device_train_batch_size=SEQUENCES,
                max_steps=job.distill.steps,
                learning_rate=1e-3,
                weight_decay=0.1,
                bf16=False,
                use_cpu=True,
                **settings,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                dataloader_num_workers=0,
            ),
            data_collator=collate,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()


def job_teacher(world: World) -> str:
    """The teacher's folder."""
    return str(world.root / "teacher")


def prepare_main(root: str, log: str) -> None:
    """A process: makes the world and fills its caches."""
    silence(log)
    from tests.fixtures.ranks import start

    make(Path(root)).capture_all(start())


@contextmanager
def child_environment() -> Iterator[None]:
    """Children start as one rank of one, on one thread."""
    before = dict(os.environ)
    os.environ.update(environment(0, 1, free_port()))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure(say: Callable[[str], None] = print) -> dict[str, Any]:
    """{tokens_per_s, peak_bytes, ratios} of all ways."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as root:
        log = str(Path(root) / "log.txt")
        say("models, corpus and caches")
        with child_environment():
            maker = context.Process(target=prepare_main, args=(root, log))
            maker.start()
        maker.join()
        if maker.exitcode:
            raise RuntimeError(Path(log).read_text()[-4000:])
        pipes, processes = {}, {}
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        peaks: dict[str, int] = {}
        try:
            for name in WAYS:  # one after the other, each until it has warmed up
                say(f"{name}: start")
                ours_end, theirs = context.Pipe()
                with child_environment():
                    process = context.Process(target=way_main, args=(name, root, theirs, log))
                    process.start()
                theirs.close()
                pipes[name], processes[name] = ours_end, process
                _answer(pipes[name], log)
            for turn in range(TURNS):
                for name in WAYS:
                    pipes[name].send(STEPS)
                    took, peaks[name] = _answer(pipes[name], log)
                    seconds[name].append(statistics.median(took))
                say(f"turn {turn + 1}/{TURNS}")
        finally:
            for name, process in processes.items():
                with suppress(BrokenPipeError):  # it has failed, and its error is on its way
                    pipes[name].send(0)
                    process.join(20)
                process.kill()
    return {
        "tokens_per_s": {
            name: round(TOKENS / statistics.median(took), 1) for name, took in seconds.items()
        },
        "peak_bytes": peaks,
        "over": {
            f"{a}/{b}": round(
                statistics.median(y / x for x, y in zip(seconds[a], seconds[b], strict=True)), 3
            )
            for a, b in (
                ("cached_sample", "ce"),
                ("cached_topk", "ce"),
                ("cached_sample", "ce_fused"),
                ("cached_topk", "ce_fused"),
                ("cached_sample", "online"),
                ("cached_topk", "online"),
                ("cached_sample", "trl_gkd"),
                ("cached_topk", "trl_gkd"),
                ("cached_sample", "trl_gkd_forward_kl"),
                ("cached_topk", "trl_gkd_forward_kl"),
                ("online", "trl_gkd"),
            )
            if {a, b} <= seconds.keys()
        },
    }


def _answer(pipe: Connection, log: str) -> tuple[list[float], int]:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(Path(log).read_text()[-4000:]) from None
