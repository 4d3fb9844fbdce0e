"""The section `sweep` beyond bits and groups, and the cells that it asks for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from quant.grid import allocated_keys, grid, uniform
from quant.quant_spec import QuantSpec
from quant.spec import SweepSpec


def keys(**settings: Any) -> list[str]:
    return [cell.key for cell in grid(SweepSpec(**settings))]


def fault(**settings: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        SweepSpec(**settings)
    (found,) = caught.value.errors()
    return ".".join(map(str, found["loc"])) + ": " + found["msg"]


def test_the_ends_are_axes_of_the_grid() -> None:
    both = {"bits": [4], "group_size": [64], "embeddings": [False, True], "head": [False, True]}
    assert keys(**both) == [
        "hqq-4b-g64",
        "hqq-4b-g64-head",
        "hqq-4b-g64-embeddings",
        "hqq-4b-g64-embeddings-head",
    ]
    tied = [{"embeddings": True, "head": False}, {"embeddings": False, "head": True}]
    assert keys(**both, exclude=tied) == ["hqq-4b-g64", "hqq-4b-g64-embeddings-head"]
    assert keys(bits=[4], group_size=[64], embeddings=True, head=True) == [
        "hqq-4b-g64-embeddings-head"
    ]


def test_exclusions_hold_for_all_their_keys_together() -> None:
    left = keys(
        bits=[4, 2],
        group_size=[64, "channel"],
        methods=["hqq", "rtn"],
        exclude=[{"bits": 2, "method": "rtn"}, {"group_size": "channel"}],
    )
    assert left == ["hqq-4b-g64", "hqq-2b-g64", "rtn-4b-g64"]


def test_the_teacher_is_quantized_too_where_it_is_asked_for() -> None:
    found = keys(
        bits=[4, 2],
        group_size=[64],
        models=["teacher", "student"],
        exclude=[{"model": "teacher", "bits": 2}],
    )
    assert found == ["teacher-hqq-4b-g64", "hqq-4b-g64", "hqq-2b-g64"]


def test_recovered_cells_stand_after_their_plain_ones() -> None:
    recover = {"steps": 3, "bits": [2]}
    assert keys(bits=[4, 2], group_size=[64], recover=recover) == [
        "hqq-4b-g64",
        "hqq-2b-g64",
        "hqq-2b-g64-recovered",
    ]
    both = {"bits": [2], "group_size": [64], "recover": recover}
    assert keys(models=["teacher", "student"], **both) == [
        "teacher-hqq-2b-g64",
        "hqq-2b-g64",
        "hqq-2b-g64-recovered",
    ]
    assert keys(models=["teacher"], **both) == [
        "teacher-hqq-2b-g64",
        "teacher-hqq-2b-g64-recovered",
    ]
    dynamic = {"methods": ["int8-dynamic"], "recover": {"bits": [8]}}
    assert keys(**dynamic) == ["int8-dynamic-8b-channel"], "its scales are not trained"


def test_allocated_cells_are_named_by_their_budgets() -> None:
    assert allocated_keys(SweepSpec(budgets_mb=[0.7, 1200])) == {
        "allocated-0.7mb": 0.7,
        "allocated-1200mb": 1200,
    }
    assert list(allocated_keys(SweepSpec(models=["teacher"], budgets_mb=[5]))) == [
        "teacher-allocated-5mb"
    ]


def test_a_cell_says_all_that_it_depends_on() -> None:
    plain = uniform(QuantSpec(4, 64))
    cells = [
        plain,
        uniform(QuantSpec(4, 64), "teacher"),
        uniform(QuantSpec(4, 64), recovered=True),
        uniform(QuantSpec(4, 32)),
    ]
    assert len({str(cell.to_dict()) for cell in cells}) == len({cell.key for cell in cells}) == 4


def test_tasks_are_names_or_settings_or_folders() -> None:
    tasks = SweepSpec(tasks=["arc_easy", {"task": "piqa", "num_fewshot": 5, "limit": 10}]).tasks
    assert [(task.task, task.num_fewshot, task.limit) for task in tasks] == [
        ("arc_easy", None, None),
        ("piqa", 5, 10),
    ]
    assert SweepSpec(tasks=[{"folder": "here"}]).tasks[0].folder == "here"
    for wrong in ({}, {"task": "a", "folder": "b"}):
        assert "one of the two" in fault(tasks=[wrong])
    assert "tasks.0.limit" in fault(tasks=[{"task": "a", "limit": 0}])


def test_extra_models_have_names_of_their_own() -> None:
    extra = [{"path": "models/My Model.v2/"}, {"path": "other", "name": "gptq-4b"}]
    labels = [item.label for item in SweepSpec(extra=extra).extra]
    assert labels == ["my-model.v2", "gptq-4b"]
    assert "called same" in fault(extra=[{"path": "a/same"}, {"path": "b/same"}])
    assert "extra.0.name" in fault(extra=[{"path": "a", "name": "No Name"}])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"exclude": [{}]}, "exclude.0: Value error, excludes every cell"),
        ({"exclude": [{"bits": b} for b in (8, 4, 3, 2)]}, "exclude leaves no cell"),
        ({"embeddings": []}, "embeddings"),
        ({"models": []}, "models"),
        ({"models": ["student", "student"]}, "listed more than once"),
        ({"models": ["control"]}, "models.0"),
        ({"budgets_mb": [0]}, "budgets_mb.0"),
        ({"budgets_mb": [1, 1]}, "listed more than once"),
        ({"keep_models": "some"}, "keep_models"),
        ({"recover": {"steps": 0}}, "recover.steps"),
        ({"recover": {"bits": [7]}}, "7 bits are not offered"),
        ({"recover": {"learning_rate": -1}}, "recover.learning_rate"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SweepSpec(**settings)
    lines = [
        ".".join(map(str, found["loc"])) + ": " + found["msg"] for found in caught.value.errors()
    ]
    assert any(told in line for line in lines), lines
