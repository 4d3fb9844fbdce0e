"""A cell as its task does it: what it says of itself, and what is left when it is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Attempt, Store, open_store
from jobs.sweep.shared import SharedContext, Source
from jobs.sweep.tasks import call, cell_task, made_path, model_task
from quant.evaluation.memory_forecast import MemoryEstimate
from quant.grid import uniform
from quant.quant_spec import QuantSpec
from quant.spec import SweepSpec
from tests.fixtures.corpora import data_spec, make_corpus, save_model, write_texts

CELL = uniform(QuantSpec(4, 16))
NEED = MemoryEstimate(1, 0, 0, {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[SharedContext, Source]:
    """A run whose student has its references."""
    root: Path = tmp_path_factory.mktemp("cells")
    store = open_store(root)
    corpus = make_corpus(store.sub("corpus"), data_spec(write_texts(root / "texts")))
    student = save_model(root / "student", corpus.tokenizer_folder())
    attempt = Attempt.claim(store.sub("run"))
    sweep = SweepSpec(bits=[4], group_size=[16], batch_sequences=4, dtype="float32")
    vocab = int(corpus.manifest["vocab_size"])
    shared_context = SharedContext(sweep, store.sub("corpus"), None, attempt, vocab, 1, 1, 0.0)
    source = Source("student", str(student), "main", "tiny", "identity", "references/student")
    told: list[float] = []
    call(model_task, (shared_context, source, "print", True), lambda done, words: told.append(done))
    assert told == sorted(told) and told[-1] == pytest.approx(1)
    return shared_context, source


def run(world: tuple[SharedContext, Source], own_fingerprint: str, *reports: Any) -> dict[str, Any]:
    shared_context, source = world
    result: dict[str, Any] = call(
        cell_task, (shared_context, CELL, own_fingerprint, source, NEED), *reports
    )
    return result


def store_of(world: tuple[SharedContext, Source]) -> Store:
    return world[0].attempt.store


def test_it_tells_how_far_it_is_from_its_beginning_to_its_end(world) -> None:
    told: list[tuple[float, str]] = []
    count = world[0].sequences("report")
    run(world, "told", lambda done, words: told.append((done, words)))
    shares = [done for done, _ in told]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(1)
    kinds = list(dict.fromkeys(words.partition(":")[0] for _, words in told))
    assert kinds == [
        "loading the model",
        "quantizing",
        "evaluated on select",
        "evaluated on report",
    ]
    assert told[-1][1] == f"evaluated on report: {count} of {count} sequences"


def test_a_cell_that_is_stopped_while_it_is_evaluated_is_not_quantized_again(
    world, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(world, "one")

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("quant.evaluation.cell.measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(world, "two")
    assert store_of(world).read_json(made_path(CELL.key))["fingerprint"] == "two"
    with monkeypatch.context() as patched:
        patched.setattr("quant.evaluation.cell.quantize", stopped)
        with pytest.raises(KeyboardInterrupt):  # another cell by now: it is made anew
            run(world, "three")
        continued = run(world, "two")
    for name in ("per_sequence", "perplexity", "kl_to_student", "bytes", "bits_per_weight"):
        assert continued[name] == undisturbed[name]
    assert continued["fingerprint"] == "two" and continued["quantize_s"] > 0
    assert not store_of(world).exists(made_path(CELL.key))
