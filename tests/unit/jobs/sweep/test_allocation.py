"""Which tasks an allocation asks for, and what it decides from their results. The results are made
up here: measuring is tested where it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from cluster.fanout import Failure
from cluster.session import Cluster
from cluster.spec import CellResources
from cluster.storage import Attempt, open_store
from jobs.sweep.allocation import Allocations
from jobs.sweep.resources import CellRequests
from jobs.sweep.shared import SharedContext, Source
from quant.spec import SweepSpec
from trainer.models.load import meta_model

MODEL = meta_model(
    LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=True,
    )
)
OUTPUTS: dict[str, Any] = {"prepare": {"corpus": "one"}}


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt.claim(open_store(tmp_path))


def allocations(attempt: Attempt, budgets: list[float], **changes: Any) -> Allocations:
    sweep = SweepSpec(bits=[4, 2], group_size=[32], budgets_mb=budgets, **changes)
    shared_context = SharedContext(sweep, attempt.store, None, attempt, 256, 1, 1, 0.0)
    source = Source("student", "model", "main", "model", {"weights": "x"}, "references/student")
    cluster = Cluster("local", ((2, 0),), True)
    needs = CellRequests(sweep, CellResources(), cluster, 32, 1, 0.0, {"student": MODEL})
    return Allocations(sweep, shared_context, source, needs, OUTPUTS)


def worth(layer: str, bits: int) -> float:
    """A made-up loss: wide layers of the first block matter most."""
    return (8.0 if "layers.0" in layer else 1.0) * (0.01 if bits == 4 else 0.2)


def answer(name: str, arguments: tuple[Any, ...]) -> Any:
    """What the task would return, if losses of layers added up."""
    if name.startswith("sensitivity/"):
        found = {}
        for layer, option in arguments[1]:
            kl = worth(layer, option.spec.bits)
            found[layer, option.key] = {"kl": kl, "sums": [kl], "tokens": [1]}
        return found
    cell = arguments[1]
    return {"kl": sum(worth(n, s.bits) for n, s in cell.layers.items() if s is not None)}


def work_through(found: Allocations, fail: str = "") -> list[Any]:
    """Does all tasks that are asked for; returns the cells."""
    to_run, cells = list(found.first()), []
    while to_run:
        key, _, arguments = to_run.pop(0)
        name = key.removeprefix("allocate/")
        result: Any = answer(name, arguments)
        if fail and name.startswith(fail):
            result = Failure("why", "why", "memory")
        more, decided = found.ended(name, result)
        to_run += more
        cells += decided
    return cells


def test_the_best_that_was_measured_becomes_a_cell_with_controls(attempt: Attempt) -> None:
    # 33 kB are the embeddings' and norms'; between uniform 2 and 4 bits.
    found = allocations(attempt, [0.07])
    assert found.known() == [] and found.to_come() == 1
    cells = work_through(found)
    assert found.to_come() == 0 and found.take_failures() == []
    allocated, *controls = cells
    assert allocated.key == "allocated-0.07mb" and allocated.budget_mb == 0.07
    decision = attempt.store.read_json("allocations/allocated-0.07mb.json")
    assert decision["bytes"] <= 70_000
    assert decision["select_kl"] == min(tried["select_kl"] for tried in decision["tried"])
    bits = {name: spec.bits if spec else 16 for name, spec in allocated.layers.items()}
    first = [value for name, value in bits.items() if "layers.0" in name]
    second = [value for name, value in bits.items() if "layers.1" in name]
    assert sum(first) > sum(second), "bits go where they are worth most"
    assert controls and all(cell.control_of == ("allocated-0.07mb",) for cell in controls)
    assert all(cell.spec.group_size == 32 and not cell.layers for cell in controls)


def test_it_is_decided_once_and_layers_are_measured_once(attempt: Attempt) -> None:
    cells = work_through(allocations(attempt, [0.07]))
    again = allocations(attempt, [0.07])
    known = again.known()
    assert [cell.to_dict() for cell in known] == [cell.to_dict() for cell in cells]
    assert again.first() == [] and again.to_come() == 0
    more = allocations(attempt, [0.07, 0.075])
    more.known()
    names = [key for key, *_ in more.first()]
    assert names and all(name.startswith("allocate/allocated-0.075mb/") for name in names)
    other = allocations(attempt, [0.07], batch_sequences=4)
    assert other.known() == [], "of another way to measure"
    assert all("sensitivity" in key for key, *_ in allocations(attempt, [0.08]).first(anew=True))


def test_a_budget_that_nothing_fits_fails_alone(attempt: Attempt) -> None:
    found = allocations(attempt, [0.001, 0.07])
    cells = work_through(found)
    assert cells[0].key == "allocated-0.07mb"
    ((key, error),) = found.take_failures()
    assert key == "allocated-0.001mb" and "sweep.budgets_mb: " in error and "bytes" in error
    assert found.to_come() == 0 and found.empty_cell(key).budget_mb == 0.001


def test_what_cannot_be_measured_fails_the_cells(attempt: Attempt) -> None:
    found = allocations(attempt, [0.07, 0.075])
    assert work_through(found, fail="sensitivity/1") == []
    assert dict(found.take_failures()) == dict.fromkeys(
        ["allocated-0.07mb", "allocated-0.075mb"], "measuring its layers: why"
    )
    found = allocations(attempt, [0.07])
    assert work_through(found, fail="allocated-0.07mb/") == []
    assert found.take_failures() == [("allocated-0.07mb", "why")]
    found = allocations(attempt, [0.07])
    assert work_through(found, fail="allocated-0.07mb/0"), "the others decide"
