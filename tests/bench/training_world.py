"""The models, data and caches that the training bench measures on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.storage import open_store

# Measured once elsewhere on one thread with these sizes: cross-entropy 3,357 tokens/s, TRL 689.
LENGTH, SEQUENCES, VOCAB = 256, 4, 8192
TEACHER = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
STUDENT = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# Sequences that are captured, and read again and again.
POOL = 32
METHODS = {"sample": {"method": "sample", "draws": 50}, "topk": {"method": "topk", "k": 64}}


@dataclass(frozen=True)
class World:
    """A folder that holds the teacher, the corpus and one cache of each method."""

    root: Path

    def data(self) -> Any:
        """Real text in sequences without borders, so that every variant has the same attention."""
        from trainer.spec.sections import DataSpec, SourceSpec

        return DataSpec(
            train=[SourceSpec(source="builtin:python-docs")],
            sequence_length=LENGTH,
            select_sequences=8,
            report_sequences=8,
            packing="concat",
            max_tokens=POOL * LENGTH,
        )

    def teacher(self) -> Any:
        """The teacher's spec."""
        from trainer.spec.sections import TeacherSpec

        return TeacherSpec(model=str(self.root / "teacher"), dtype="float32", sharding="none")

    def training(
        self, name: str, mode: str, losses: dict[str, float], cache: str, steps: int
    ) -> Any:
        """A training in a folder of its own."""
        from trainer.logits.store import open_cache
        from trainer.spec.sections import CacheSpec, DistillSpec, StudentSpec
        from trainer.training.job import Training

        store = open_store(str(self.root))
        kept = open_cache(store.sub("caches"), {"bench": cache})
        has_teacher = set(losses) != {"ce"}
        folder = store.sub("trainings", name)
        return Training(
            stage="distill",
            teacher=self.teacher() if has_teacher else None,
            student=StudentSpec(config=STUDENT, init="random"),
            distill=DistillSpec(
                mode=mode,
                losses=losses,
                dtype="float32",
                steps=steps,
                tokens_per_step=SEQUENCES * LENGTH,
                micro_batch=SEQUENCES,
                learning_rate=1e-3,
                evaluate_steps=None,
                activation_checkpointing=False,
            ),
            data=self.data(),
            cache_spec=CacheSpec(**METHODS[cache]),
            seed=1,
            corpus=store.sub("corpus"),
            cache=kept if has_teacher else None,
            checkpoints=folder.sub("checkpoints"),
            output=folder.sub("student"),
            last=folder.sub("student-last"),
        )

    def capture(self, cache: str) -> Any:
        """The capture that fills one of the caches."""
        from trainer.spec.sections import CacheSpec
        from trainer.teacher.job import Capture

        job = self.training("capture", "cached", {"forward_kl": 1.0}, cache, POOL)
        return Capture(
            teacher=self.teacher(),
            cache_spec=CacheSpec(**METHODS[cache]),
            data=self.data(),
            distill=job.distill,
            seed=job.seed,
            batch_tokens=2048,
            shard_seconds=1e9,
            corpus=job.corpus,
            cache=job.cache,
        )

    def capture_all(self, worker: Any) -> None:
        """Fills both caches."""
        from trainer.run_task import run_task

        for cache in METHODS:
            run_task(self.capture(cache), worker)


def make(root: Path) -> World:
    """Corpus and teacher (random weights: speeds do not depend on them) in `root`."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.corpus.identity import corpus_identity
    from trainer.corpus.prepare import prepare
    from trainer.corpus.tokenizer import load_tokenizer
    from trainer.models.load import new_config
    from trainer.spec.sections import TokenizerSpec

    world = World(root)
    store = open_store(str(root)).sub("corpus")
    wanted = {"train": VOCAB}
    identity = corpus_identity(world.data(), wanted)
    prepare(world.data(), TokenizerSpec(train=VOCAB), store, identity=identity)
    tokenizer = load_tokenizer(store.fetch_folder("tokenizer"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(new_config("teacher", TEACHER, tokenizer, LENGTH))
    model.save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    return world
