"""Trainings of small students on real process groups, and what the ranks hold at their end."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.material import LENGTH
from tests.ranks import Log, Ranks, Told, start

STEPS, STOP_AT = 4, 2
# So fine that losses can be compared.
KEPT = {"method": "topk", "k": 8, "step": 0.001}


# What runs on the ranks.


@dataclass
class Seen:
    """What a rank has to say of one training."""

    told: Told
    state: dict[str, Any]
    start: dict[str, Any]
    folder: str
    logits: np.ndarray | None
    optimizer: str
    trained: list[str]
    moments: dict[str, int]


def train_all(jobs: list[tuple[Any, int | None]]) -> list[dict[str, Any]]:
    """Trains each job, or stops it in step so-and-so and resumes it at once.

    Gives the fields of a `Seen` for each: its class has another name in this process.
    """
    worker = start()
    return [vars(one(job, stop, worker)) for job, stop in jobs]


def one(job: Any, stop: int | None, worker: Any) -> Seen:
    from trainer import loop
    from trainer.publish import publish
    from trainer.worker import Stopped

    seen: list[Seen] = []

    def spy(job: Any, built: Any, corpus: Any, worker: Any, *rest: Any, **more: Any) -> Any:
        seen.append(look(job, built, corpus, worker))
        return publish(job, built, corpus, worker, *rest, **more)

    log = Log(stop)
    own, loop.publish = loop.publish, spy
    began = time.time()
    try:
        try:
            metrics = loop.train(job, replace(worker, hooks=log.hooks(1)))
        except Stopped:
            log.stop_at = None
            metrics = loop.train(job, replace(worker, hooks=log.hooks(2)))
    finally:
        loop.publish = own
    (result,) = seen
    result.told = Told(log.events, metrics, seconds=time.time() - began)
    return result


def look(job: Any, built: Any, corpus: Any, worker: Any) -> Seen:
    """What the engine holds at the end of a training."""
    from trainer.student.saving import student_state

    engine = built.engine
    state = student_state(built, worker.is_main)
    moments: dict[str, int] = {}
    for values in engine.optimizer.optimizer.state.values():
        for value in values.values():
            where = f"{value.device.type} {str(value.dtype)}"
            moments[where] = moments.get(where, 0) + value.numel()
    return Seen(
        told=Told([]),
        state={name: value.float().numpy() for name, value in state.items()},
        start={
            name: value.detach().float().numpy()
            for name, value in built.untrained().named_parameters()
        },
        folder=str(job.output.local()),
        logits=engine_logits(built, corpus, worker),
        optimizer=type(engine.optimizer).__name__,
        trained=[name for name, value in engine.module.named_parameters() if value.requires_grad],
        moments=moments,
    )


def engine_logits(built: Any, corpus: Any, worker: Any) -> np.ndarray:
    """The engine's own logits [tokens, vocab] of the first report sequences."""
    import torch

    from trainer.losses import CrossEntropy
    from trainer.student import module as student

    seen, fused_loss = [], student.fused_loss

    def spy(hidden: Any, head: Any, *rest: Any) -> Any:
        seen.append(head.logits(hidden))  # inside the engine's forward: ZeRO-3 has the head here
        return fused_loss(hidden, head, *rest)

    batch = corpus.part("report").batch(np.arange(3))
    ids = torch.from_numpy(batch.input_ids)
    built.engine.eval()
    student.fused_loss = spy
    try:
        with torch.no_grad():
            built.engine(
                input_ids=ids,
                position_ids=torch.from_numpy(batch.position_ids),
                token_weights=torch.ones(ids.numel()),
                labels=ids.reshape(-1),
                losses={"ce": (1.0, CrossEntropy())},
            )
    finally:
        student.fused_loss = fused_loss
    return torch.cat(seen).float().numpy()


# The trainings.


@dataclass
class World:
    """A folder with a corpus, teachers and a cache, and the jobs that can be made of them."""

    root: Path
    data: Any
    corpus: Any

    def job(self, name: str, student: dict[str, Any], **distill: Any) -> Any:
        """A training into folders of its own; with a teacher where the student is cut from one."""
        from cluster.storage import open_store
        from trainer.spec import CacheSpec, DistillSpec, StudentSpec, TeacherSpec
        from trainer.training import Training

        values: dict[str, Any] = {
            "losses": {"forward_kl": 0.7, "ce": 0.3},
            "dtype": "float32",
            "steps": STEPS,
            "tokens_per_step": 8 * LENGTH,
            "micro_batch": 2,
            "learning_rate": 5e-3,
            "activation_checkpointing": False,
            "evaluate_steps": None,
        }
        store = open_store(self.root)
        return Training(
            stage="distill",
            teacher=TeacherSpec(model=str(self.root / "teacher")),
            student=StudentSpec(**student),
            distill=DistillSpec(**{**values, **distill}),
            data=self.data,
            cache_spec=CacheSpec(**KEPT),
            seed=3,
            corpus=store.sub("corpus"),
            cache=store.sub("cache"),
            checkpoints=store.sub("checkpoints", name),
            output=store.sub("students", name),
            last=store.sub("last", name),
        )

    def model(self, name: str) -> str:
        return str(self.root / name)


def deepen(folder: Path, layers: int) -> None:
    """Gives a model more layers, each of its own kind."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    config.use_sliding_window, config.sliding_window = True, 4
    config.layer_types = [
        "sliding_attention" if layer % 2 else "full_attention" for layer in range(layers)
    ]
    torch.manual_seed(8)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.25)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")


def run(jobs: dict[str, tuple[Any, int | None]], world: int) -> list[dict[str, Seen]]:
    """By rank and name, what was seen of the jobs."""
    ranks = Ranks(train_all, list(jobs.values()), world=world).results()
    return [
        {name: Seen(**fields) for name, fields in zip(jobs, results, strict=True)}
        for results in ranks
    ]
