"""Recovery of a quantized model: what it learns from, what it keeps, what it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.storage import Store, open_store
from jobs.sweep.shared import teacher_records
from quant.artifact import save_quantized
from quant.evaluation.measure import EvaluationData
from quant.evaluation.reference import write_reference
from quant.layers.linear import quant_weights
from quant.quant_spec import QuantSpec
from quant.quantize import quantize
from quant.recovery.recover import recover
from quant.spec import RecoverSpec
from tests.fixtures.corpora import (
    LENGTH,
    VOCAB,
    data_spec,
    log_softmax,
    make_corpus,
    plain_cache,
    plain_logits,
    save_model,
    write_texts,
)
from trainer.corpus.corpus import Batch, Corpus, open_corpus
from trainer.corpus.schedule import make_schedule
from trainer.logits.codebook_fit import fit_codebook
from trainer.logits.codec import encode
from trainer.logits.reader import CacheReader
from trainer.logits.records import Draws, coding_of
from trainer.logits.store import publish_codebook, write_shard
from trainer.models.load import load_for_inference
from trainer.spec.losses import LossesSpec
from trainer.spec.sections import CacheSpec, DataSpec, DistillSpec

# A training that reads the whole train part, and one that reads six sequences of it.
ALL = DistillSpec(steps=100, tokens_per_step=64 * LENGTH, learning_rate=1e-3)
SIX = DistillSpec(steps=1, tokens_per_step=6 * LENGTH, learning_rate=1e-3)
CACHES = {
    "topk": CacheSpec(method="topk", k=16),
    "sample": CacheSpec(method="sample", draws=20, redraws=2),
    "warm": CacheSpec(method="topk", k=16, temperatures=[2.0]),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class World:
    """A corpus, a 16-bit student (tied), and caches of a teacher that is near to it."""

    corpus_store: Store
    corpus: Corpus
    student: str
    caches: dict[str, Store]
    data: DataSpec

    def batches(self, part: str) -> Iterator[Batch]:
        found = self.corpus.part(part)
        yield found.batch(np.arange(len(found)))

    def select(self, cache: str | None) -> EvaluationData:
        batches = partial(self.batches, "select")
        if cache is None:
            return EvaluationData(batches)
        reader = CacheReader(self.caches[cache], "eval")
        return EvaluationData(
            batches, lambda: (teacher_records(reader, batch) for batch in batches())
        )

    def quantized(self, bits: int = 2, ends: bool = False) -> Any:
        return quantize(load_for_inference(self.student), QuantSpec(bits, 16, "hqq", ends, ends))

    def recover(
        self,
        model: Any,
        cache: str | None = None,
        *,
        seed: int = 3,
        select: EvaluationData | None = None,
        store: Store | None = None,
        distill: DistillSpec | None = ALL,
        **spec: Any,
    ) -> Any:
        return recover(
            model,
            RecoverSpec.model_validate({"steps": 24, "batch_sequences": 16, **spec}),
            corpus=self.corpus_store,
            cache=store or (None if cache is None else self.caches[cache]),
            cache_spec=None if cache is None else CACHES[cache],
            data=self.data,
            distill=distill,
            select=select or self.select(cache),
            reference_folder=self.student,
            vocab=VOCAB,
            seed=seed,
        )

    def kl(self, model: Any, part: str = "select") -> float:
        """Mean KL of the 16-bit student to `model` in nats, in float64, by plain forward passes."""
        (batch,) = self.batches(part)
        p = log_softmax(plain_logits(load_for_inference(self.student), batch, by_document=True))
        q = log_softmax(plain_logits(model, batch, by_document=True))
        counted = batch.loss_mask > 0
        return float((np.exp(p) * (p - q)).sum(-1)[counted].mean())


@pytest.fixture(scope="module")
def world(tmp_path_factory: Any) -> World:
    folder: Path = tmp_path_factory.mktemp("recovery")
    store = open_store(folder / "corpus")
    data = data_spec(write_texts(folder / "texts", documents=160))
    corpus = make_corpus(store, data)
    student = save_model(folder / "student", corpus.tokenizer_folder())
    teacher = load_for_inference(str(student), dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    caches = {name: open_store(folder / name) for name in CACHES}
    for name, spec in CACHES.items():
        plain_cache(caches[name], teacher, corpus, spec, by_document=True)
    return World(store, open_corpus(store), str(student), caches, data)


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("ends", [False, True], ids=["16-bit ends", "quantized ends"])
def test_the_student_beside_it_teaches_what_is_on_neither_part(world: World, ends: bool) -> None:
    model = world.quantized(ends=ends)
    codes = {name: layer.unpacked().codes for name, layer in quant_weights(model).items()}
    before = {part: world.kl(model, part) for part in ("select", "report")}
    found = world.recover(model, learning_rate=0.03)
    after = {part: world.kl(model, part) for part in ("select", "report")}
    assert after["select"] < 0.7 * before["select"] and after["report"] < 0.7 * before["report"]
    # What it says is what float64 says; the model's own bfloat16 is the same in both.
    assert found["select_before"] == pytest.approx(before["select"], rel=0.01)
    assert found["select_after"] == pytest.approx(after["select"], rel=0.01)
    assert found["target"] == "student" and found["metric"] == "kl_to_reference"
    assert found["last_loss"] < 0.8 * found["first_loss"]
    for name, layer in quant_weights(model).items():
        assert torch.equal(layer.unpacked().codes, codes[name])


@pytest.mark.parametrize("cache", CACHES)
def test_records_of_the_teacher_teach_it_too(world: World, cache: str) -> None:
    model = world.quantized()
    found = world.recover(model, cache, learning_rate=0.03)
    assert found["target"] == "teacher" and found["metric"] == "kl_to_teacher"
    assert found["select_after"] < 0.85 * found["select_before"]
    # The metric is a cell's own.
    again = world.recover(model, cache, steps=1, learning_rate=1e-9)
    assert again["select_before"] == found["select_after"]


def test_stored_answers_of_the_student_serve_as_it_does(world: World, tmp_path: Path) -> None:
    model = load_for_inference(world.student)
    write_reference(model, world.batches("select"), tmp_path / "stored")
    found = []
    for folder in (None, str(tmp_path / "stored")):
        part = EvaluationData(partial(world.batches, "select"), reference=folder)
        found.append(world.recover(world.quantized(), select=part, steps=2))
        found[-1].pop("seconds")
    assert found[0] == found[1]


def test_the_loss_is_the_mean_kl_of_the_tokens(world: World) -> None:
    """Of one step over the whole train part, in micro-batches of which the last is filled up."""
    sequences = len(world.corpus.part("train"))
    assert sequences > 128 and sequences % 128
    model = world.quantized()
    expected = world.kl(model, "train")
    found = world.recover(model, steps=1, batch_sequences=sequences)
    assert found["first_loss"] == pytest.approx(expected, rel=0.01)
    assert found["tokens"] == world.corpus.part("train").loss_tokens.sum()


def test_only_sequences_with_records_are_read(world: World, tmp_path: Path) -> None:
    """The cache of a training that read a part of the train part, once, holds no more: the second
    set of draws, which later epochs would read, is not there."""
    spec, cache = CACHES["sample"], open_store(tmp_path / "few")
    part = world.corpus.part("train")
    used = make_schedule(world.corpus, world.data, SIX, 3).used()
    assert len(used) == 6
    keys = [key.tobytes() for key in part.keys[used]]
    draw = np.random.default_rng(2)
    items = [
        Draws(np.sort(draw.integers(0, VOCAB, (LENGTH, spec.draws)), axis=1).astype(np.int32))
        for _ in keys
    ]
    codebook = publish_codebook(
        cache, "train", fit_codebook(coding_of(spec, VOCAB, "train"), items)
    )
    write_shard(cache, "train", keys, [encode(item, codebook) for item in items])
    found = world.recover(world.quantized(), "sample", store=cache, distill=SIX, steps=3)
    assert found["target"] == "teacher"
    tokens = part.loss_tokens[used]
    assert 3 * 16 * tokens.min() <= found["tokens"] <= 3 * 16 * tokens.max()


def test_the_same_twice_and_another_with_another_seed(world: World) -> None:
    made = []
    for seed in (3, 3, 4):
        model = world.quantized()
        found = world.recover(model, "topk", seed=seed)
        found.pop("seconds")
        made.append((found, tensors(model)))
    (one, first), (two, second), (three, third) = made
    assert one == two and one["evaluations"] != three["evaluations"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_weights_that_do_no_better_are_not_kept(world: World) -> None:
    model = world.quantized(bits=8)
    before = tensors(model)
    found = world.recover(model, steps=4, learning_rate=0.5)
    assert found["best_step"] == 0 and found["select_after"] == found["select_before"]
    assert all(item["select"] > found["select_before"] for item in found["evaluations"])
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())


def test_the_best_of_the_weights_under_way_is_kept(world: World) -> None:
    model = world.quantized()
    found = world.recover(model, steps=24, learning_rate=0.3)
    best = min(found["evaluations"], key=lambda item: item["select"])
    assert found["best_step"] == best["step"] and found["select_after"] == best["select"]
    assert world.kl(model) == pytest.approx(best["select"], rel=0.01)
    assert [item["step"] for item in found["evaluations"]] == [3, 6, 9, 12, 15, 18, 21, 24]


def test_what_comes_out_is_an_ordinary_quantized_model(world: World, tmp_path: Path) -> None:
    model = world.quantized(ends=True)
    size = {}
    for name in ("plain", "recovered"):
        if name == "recovered":
            world.recover(model, steps=2)
        folder = save_quantized(model, tmp_path / name, model.quant_spec)
        size[name] = (folder / "quantized.safetensors").stat().st_size
    assert size["plain"] == size["recovered"]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_loss_that_is_no_number_says_what_to_set(world: World) -> None:
    model = world.quantized()
    with pytest.raises(
        ArithmeticError, match="in step .*set sweep.recover.learning_rate below"
    ) as e:
        world.recover(model, learning_rate=1e30)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "training",
    [None, {"mode": "online"}, {"losses": LossesSpec.model_validate({"ce": 1.0})}],
    ids=["no training", "a teacher beside it", "text alone"],
)
def test_without_records_of_this_run_the_student_teaches(
    world: World, training: dict[str, Any] | None
) -> None:
    """Also where the cache holds some: they are other runs', and come and go with those."""
    distill = None if training is None else ALL.model_copy(update=training)
    found = world.recover(world.quantized(), "topk", distill=distill, steps=1)
    assert found["target"] == "student"
    with pytest.raises(ValueError, match="teacher needs this run's records of the train part"):
        world.recover(world.quantized(), "topk", distill=distill, target="teacher")


def test_what_is_asked_for_and_not_there(world: World) -> None:
    with pytest.raises(ValueError, match="teacher needs this run's records of the train part"):
        world.recover(world.quantized(), target="teacher")
    assert (
        world.recover(world.quantized(), "topk", target="student", steps=1)["target"] == "student"
    )
