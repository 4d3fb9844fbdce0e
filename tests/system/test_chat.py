"""A cache of the positions that count alone: the same records, the same training, in less room."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.corpora import (
    chat_tokenizer,
    config_values,
    data_spec,
    make_corpus,
    save_model,
    write_chats,
    write_texts,
)
from tests.fixtures.ranks import Log, Told, spawn, start

CHAT_LENGTH = 96
STEPS = 4
POOL = 16  # sequences of an epoch; the steps read one and a half
DRAWN = {"method": "sample", "draws": 12, "redraws": 2}
# What stands for a step depends on the records that the codebook is fitted on, but hardly.
KEPT = {"method": "topk", "k": 8, "step": 0.005}
METHODS = {"drawn": DRAWN, "kept": KEPT}
POSITIONS = ("all", "loss")


def all_ways(captures: dict[Any, Any], trainings: dict[Any, Any]) -> dict[str, dict[Any, Any]]:
    """Runs captures and trainings on a rank, which verifies the caches if it is the first."""
    from trainer.corpus.corpus import open_corpus
    from trainer.run_task import run_task
    from trainer.verify.faithfulness import faithfulness

    worker = start()
    done: dict[str, dict[Any, Any]] = {"captures": {}, "trainings": {}, "faithful": {}}
    for jobs, into in ((captures, done["captures"]), (trainings, done["trainings"])):
        for name, job in jobs.items():
            log = Log()
            metrics = run_task(job, replace(worker, hooks=log.hooks()))
            into[name] = Told(log.events, metrics)
    if worker.is_main:
        for name, job in captures.items():
            corpus = open_corpus(job.corpus)
            done["faithful"][name] = faithfulness(job, corpus, 6, lambda line: None)
    worker.barrier()
    return done


@dataclass
class Made:
    """The jobs and what came of them on two ranks."""

    root: Path
    corpus: Any
    captures: dict[tuple[str, str], Any]
    ranks: list[dict[str, dict[Any, Any]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    from cluster.storage import open_store
    from trainer.logits.store import open_cache
    from trainer.spec.sections import CacheSpec, DistillSpec, SourceSpec, StudentSpec, TeacherSpec
    from trainer.teacher.job import Capture
    from trainer.training.job import Training

    root = tmp_path_factory.mktemp("chat")
    store = open_store(root)
    tokenizer = chat_tokenizer(root / "tokenizer")
    sources = [
        SourceSpec(source=write_chats(root / "chats", 90), format="messages"),
        SourceSpec(source=write_texts(root / "texts", 20)),
    ]
    limits = {"sequence_length": CHAT_LENGTH, "max_tokens": POOL * CHAT_LENGTH}
    data = data_spec("unused", **limits).model_copy(update={"train": sources})
    corpus = make_corpus(store.sub("corpus"), data, tokenizer)
    teacher = save_model(root / "teacher", root / "tokenizer", width=48)
    captures: dict[Any, Any] = {}
    trainings: dict[Any, Any] = {}
    for method, values in METHODS.items():
        for positions in POSITIONS:
            spec = CacheSpec(**values, positions=positions)
            identity = {f"cache.{name}": value for name, value in spec.identity().items()}
            cache = open_cache(store.sub("logits"), identity)
            distill = DistillSpec(
                losses={"forward_kl": 0.7, "ce": 0.3},
                dtype="float32",
                steps=STEPS,
                tokens_per_step=6 * CHAT_LENGTH,
                micro_batch=2,
                learning_rate=5e-3,
                evaluate_steps=None,
                activation_checkpointing=False,
            )
            name = (method, positions)
            shared = {"data": data, "distill": distill, "seed": 3, "cache_spec": spec}
            captures[name] = Capture(
                teacher=TeacherSpec(model=str(teacher), dtype="float32", sharding="none"),
                batch_tokens=4 * CHAT_LENGTH,
                shard_seconds=20.0,
                corpus=store.sub("corpus"),
                cache=cache,
                **shared,
            )
            trainings[name] = Training(
                stage="distill",
                teacher=None,
                student=StudentSpec(config=config_values(), init="random"),
                corpus=store.sub("corpus"),
                cache=cache,
                checkpoints=store.sub("checkpoints", *name),
                output=store.sub("students", *name),
                last=store.sub("students-last", *name),
                **shared,
            )
    return Made(root, corpus, captures, spawn(all_ways, captures, trainings, world=2))


def records(job: Any, kind: str, part: Any) -> list[tuple[Any, np.ndarray]]:
    """(records, loss mask) of every sequence of a part that the cache holds."""
    from trainer.logits.reader import CacheReader

    with CacheReader(job.cache, kind) as reader:
        assert reader.positions == job.cache_spec.positions
        found = []
        for number in range(len(part)):
            batch = part.batch([number])
            key = batch.keys[0].tobytes()
            if key in reader:
                found.append((reader.read(key), batch.loss_mask[0] == 1))
        return found


@pytest.mark.parametrize(
    ("kind", "name"), [("train", "train"), ("train1", "train"), ("eval", "select")]
)
def test_what_is_captured_is_what_a_capture_of_all_has_there(made, kind, name) -> None:
    """Draws, and records for evaluation, are equal to the last bit: they are of no neighbours."""
    part = made.corpus.part(name)
    whole = records(made.captures["drawn", "all"], kind, part)
    fewer = records(made.captures["drawn", "loss"], kind, part)
    assert len(whole) == len(fewer) > 5
    for (every, mask), (some, _) in zip(whole, fewer, strict=True):
        assert len(every.ids) == len(mask) and len(some.ids) == mask.sum()
        for ours, theirs in zip(some.ids, every.ids[mask], strict=True):
            assert set(ours.tolist()) == set(theirs.tolist())
        shares = (
            np.sort(np.exp(one), axis=1)[:, ::-1] for one in (some.log_probs, every.log_probs)
        )
        ours, theirs = next(shares), next(shares)[mask]
        width = min(ours.shape[1], theirs.shape[1])
        assert np.array_equal(ours[:, :width], theirs[:, :width])
        assert not ours[:, width:].any() and not theirs[:, width:].any()
        if kind == "eval":
            assert np.array_equal(some.entropy, every.entropy[mask])
            assert np.array_equal(some.true_log_prob, every.true_log_prob[mask])


def test_training_is_the_same_to_the_last_bit(made) -> None:
    for rank in made.ranks:
        whole, fewer = (rank["trainings"]["drawn", positions] for positions in POSITIONS)
        assert len(whole.losses()) in (0, STEPS)
        assert whole.losses() == fewer.losses()
    told = made.ranks[0]["trainings"]
    assert len(told["drawn", "all"].losses()) == STEPS
    for positions in POSITIONS:
        assert told["drawn", positions].values()[-1] < told["drawn", positions].values()[0]
    kept = [np.array(told["kept", positions].values()) for positions in POSITIONS]
    np.testing.assert_allclose(kept[0], kept[1], rtol=1e-3)
    assert not np.array_equal(kept[0], np.array(told["drawn", "all"].values()))


def test_a_cache_of_fewer_positions_is_smaller(made) -> None:
    parts = [made.corpus.part(name) for name in ("train", "select", "report")]
    share = sum(part.loss_tokens.sum() for part in parts) / sum(
        len(part) * CHAT_LENGTH for part in parts
    )
    assert share < 0.5
    for method in METHODS:
        whole, fewer = (made.ranks[0]["captures"][method, p].metrics for p in POSITIONS)
        assert whole["sequences"] == fewer["sequences"] and whole["tokens"] == fewer["tokens"]
        assert fewer["bytes"] < (share + 0.15) * whole["bytes"]
        for family in ("train", "eval"):
            of_one = fewer["bytes_per_token"][family] / whole["bytes_per_token"][family]
            assert 0.7 < of_one < 1.5  # per position that is there


def test_the_records_are_what_the_teacher_says(made) -> None:
    for (method, positions), kinds in made.ranks[0]["faithful"].items():
        assert [kind.kind for kind in kinds] == (
            ["train", "train1", "eval"] if method == "drawn" else ["train", "eval"]
        )
        for kind in kinds:
            assert kind.holds, (method, positions, kind)
            if positions == "all":
                assert kind.positions == kind.sequences * CHAT_LENGTH
            else:
                assert 0 < kind.positions < 0.7 * kind.sequences * CHAT_LENGTH


def test_nothing_is_missing_afterwards_and_the_sweep_reads_it(made) -> None:
    from jobs.sweep.shared import teacher_records
    from trainer.logits.reader import CacheReader
    from trainer.logits.store import CacheDamaged
    from trainer.teacher.job import missing

    part = made.corpus.part("report")
    batch = part.batch(np.arange(len(part)))
    found = []
    for positions in POSITIONS:
        job = made.captures["kept", positions]
        assert not any(numbers for _, _, numbers in missing(job, made.corpus))
        with CacheReader(job.cache, "eval") as reader:
            found.append(teacher_records(reader, batch))
            if positions == "loss":
                other = replace(batch, loss_mask=np.ones_like(batch.loss_mask))
                with pytest.raises(CacheDamaged, match=f"its sequence has {CHAT_LENGTH}"):
                    teacher_records(reader, other)
    counts = batch.loss_mask.flatten() == 1
    for name in ("ids", "log_probs", "log_tails", "entropy", "true_log_prob"):
        whole, fewer = (getattr(one, name) for one in found)
        assert whole.shape == fewer.shape
        assert np.array_equal(whole[counts], fewer[counts])
        assert not np.isnan(fewer).any()
