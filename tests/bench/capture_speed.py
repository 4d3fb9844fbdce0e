"""How fast the capture is beside the bare forward pass of the same teacher.

    .venv/bin/python -m tests.bench.capture_speed

The teacher has random weights (its speed does not depend on them): a Llama of 100 million
parameters with a vocabulary of 32,000 in bfloat16. Bare: `model(...).logits` of the same batches in
the same process. Captured: the whole way to published shards. Both in turns, medians of the rounds.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cluster.storage import Store, open_store
from trainer.corpus.corpus import Batch
from trainer.logits.store import publish_codebook, read_codebook
from trainer.spec.sections import CacheSpec, DataSpec, SourceSpec, TeacherSpec
from trainer.teacher.capture import CaptureRun
from trainer.teacher.forward import TeacherWithRecords
from trainer.teacher.job import Capture, Work
from trainer.teacher.teacher import Teacher
from trainer.worker import Worker

VOCAB, LENGTH, BATCH = 32_000, 512, 4
SPECS = {
    "topk_50": {"method": "topk", "k": 50},
    "sample_50": {"method": "sample", "draws": 50},
}


@dataclass(frozen=True)
class RandomPart:
    """A part of a corpus with random tokens, two documents in each sequence."""

    sequences: int

    @property
    def keys(self) -> np.ndarray:
        """uint8 [sequences, 16]."""
        keys = np.zeros((self.sequences, 16), np.uint8)
        keys[:, 0] = np.arange(self.sequences)
        return keys

    def batch(self, numbers: np.ndarray) -> Batch:
        """As `Part.batch`."""
        ids = [np.random.default_rng(int(i)).integers(0, VOCAB, LENGTH) for i in numbers]
        positions = np.arange(LENGTH) % (LENGTH // 2)
        shape = (len(ids), LENGTH)
        return Batch(
            np.stack(ids),
            np.broadcast_to(positions, shape).copy(),
            np.ones(shape, np.float32),
            self.keys[numbers],
        )


def make_teacher() -> Any:
    """The teacher, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)


def make_job(method: str, store: Store) -> Capture:
    """A capture of the part `train` into `store`."""
    return Capture(
        teacher=TeacherSpec(model="random"),
        cache_spec=CacheSpec(**{**SPECS[method], "remap": "none"}),
        data=DataSpec(train=[SourceSpec(source="random")], sequence_length=LENGTH),
        distill=None,
        seed=0,
        batch_tokens=BATCH * LENGTH,
        shard_seconds=20.0,
        corpus=store,
        cache=store,
    )


def measure(batches: int = 4, rounds: int = 5, threads: int | None = None) -> dict[str, float]:
    """Tokens per second of the capture over those of the bare forward pass, by method.

    threads: of torch; None: as many as there are cores.
    """
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    model = make_teacher()
    parameters = sum(p.numel() for p in model.parameters())
    worker = Worker(0, 1, torch.device("cpu"))
    teacher = Teacher(TeacherWithRecords(model, VOCAB).eval(), parameters, False, worker)
    part = RandomPart(batches * BATCH)
    corpus: Any = SimpleNamespace(manifest={"vocab_size": VOCAB}, part=lambda _: part)
    numbers = np.arange(part.sequences)

    def bare() -> None:
        with torch.inference_mode():
            for few in np.split(numbers, batches):
                batch = part.batch(few)
                _ = model(
                    input_ids=torch.from_numpy(batch.input_ids),
                    position_ids=torch.from_numpy(batch.position_ids),
                    use_cache=False,
                ).logits

    def captured(method: str, store: Store) -> None:
        lacks = np.ones((len(numbers), 1), bool)
        works = [Work("train", ("train",), numbers, lacks)]
        CaptureRun(make_job(method, store), worker, corpus, works, teacher).all_blocks()

    seconds: dict[str, list[float]] = {name: [] for name in ("bare", *SPECS)}
    with tempfile.TemporaryDirectory() as folder:
        stores = open_store(folder)
        for method in SPECS:  # the first time makes the codebook and compiles the encoder
            captured(method, stores.sub(method))
        bare()
        for number in range(rounds):
            seconds["bare"].append(_timed(bare))
            for method in SPECS:
                store = stores.sub(f"{method}-{number}")
                codebook = read_codebook(stores.sub(method), "train")
                assert codebook is not None
                publish_codebook(store, "train", codebook)
                run = _timed(lambda method=method, store=store: captured(method, store))  # type: ignore[misc]
                seconds[method].append(run)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **{f"capture_over_forward_{name}": middle["bare"] / middle[name] for name in SPECS},
        "forward_tokens_per_s": part.sequences * LENGTH / middle["bare"],
        "parameters": parameters,
    }


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name:32} {value:,.3f}")
