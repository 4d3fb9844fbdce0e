"""How groups of workers and tasks are fitted to a cluster: each on one node, or told at once."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.capacity import Group, NotEnough, fit_group, fit_task
from cluster.session import Cluster
from cluster.spec import CaptureResources, CellResources, ResourcesSpec, WorkerResources


def fit(nodes: list[tuple[int, int]], **asked: Any) -> Group:
    return fit_group("distill", WorkerResources(**asked), Cluster("local", tuple(nodes), True))


@pytest.mark.parametrize(
    ("nodes", "group"),
    [
        ([(1, 0)], Group(1, 1, 0)),
        ([(2, 0)], Group(2, 1, 0)),
        ([(8, 0)], Group(2, 4, 0)),
        ([(4, 0), (4, 0), (4, 0)], Group(2, 4, 0)),  # not 6 CPUs, which no node has
        ([(2, 0), (8, 0)], Group(2, 4, 0)),
        ([(16, 8), (16, 8)], Group(16, 1, 1)),
        ([(16, 0), (16, 4)], Group(4, 1, 1)),
    ],
)
def test_auto(nodes: list[tuple[int, int]], group: Group) -> None:
    assert fit(nodes) == group


def test_what_can_never_be_placed_is_told_with_the_numbers() -> None:
    with pytest.raises(NotEnough) as error:
        fit([(2, 0)], workers=3)
    assert str(error.value) == (
        "resources.distill: 3 workers of 1 CPUs and 0 GPUs do not fit, only 2 do "
        "(nodes: 2 CPUs and 0 GPUs); set resources.distill.workers or what each has lower"
    )
    with pytest.raises(NotEnough, match="only 0 do"):
        fit([(4, 0), (4, 0)], workers=1, cpus_per_worker=6)
    with pytest.raises(NotEnough, match="1 CPUs and 1 GPUs do not fit"):
        fit([(4, 0)], workers=1, gpus_per_worker=1)


@pytest.mark.parametrize(
    ("nodes", "asked", "group"),
    [
        ([(4, 0), (4, 0)], [1, 2], Group(2, 4, 0, 1)),
        ([(4, 0)], [1, 8], Group(8, 1, 0, 1)),  # four of them fit for now
        ([(8, 4)], [2, 8], Group(8, 1, 1, 2)),
        ([(8, 0)], [2, 2], Group(2, 4, 0, 2)),
    ],
)
def test_an_elastic_group_needs_room_for_its_fewest(
    nodes: list[tuple[int, int]], asked: list[int], group: Group
) -> None:
    assert fit(nodes, workers=asked) == group


def test_too_little_room_for_the_fewest_is_told() -> None:
    with pytest.raises(NotEnough, match="resources.distill: 3 workers of 1 CPUs .* only 2 do"):
        fit([(2, 0)], workers=[3, 8])
    assert str(fit([(4, 0)], workers=[2, 4])) == "2 to 4 workers of 1 CPUs and 0 GPUs"
    assert str(fit([(4, 0)], workers=4)) == "4 workers of 1 CPUs and 0 GPUs"


@pytest.mark.parametrize("wrong", [[2, 1], [0, 2], [1], [1, 2, 3], "many", 0, [1.5, 2]])
def test_a_range_of_workers_is_fewest_and_most(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        WorkerResources(workers=wrong)


def test_only_training_is_elastic() -> None:
    assert ResourcesSpec(distill={"workers": [2, 8]}).distill.workers == (2, 8)
    with pytest.raises(ValidationError):
        CaptureResources(workers=[2, 8])


@pytest.mark.parametrize(
    ("nodes", "asked", "wants_gpu", "fits"),
    [
        ([(8, 2)], {}, True, (1, 1)),
        ([(8, 2)], {}, False, (1, 0)),
        ([(8, 0)], {}, True, (1, 0)),
        ([(8, 2)], {"gpus_per_cell": 0.5, "cpus_per_cell": 4}, False, (4, 0.5)),
    ],
)
def test_a_task_has_what_is_asked_or_what_its_model_wants(
    nodes: list[tuple[int, int]], asked: dict[str, Any], wants_gpu: bool, fits: tuple[int, float]
) -> None:
    assert fit_task(CellResources(**asked), Cluster("local", tuple(nodes), True), wants_gpu) == fits


def test_a_task_that_fits_no_node_is_told_with_the_numbers() -> None:
    with pytest.raises(NotEnough, match="resources.sweep: a cell of 3 CPUs and 0 GPUs .*2 CPUs"):
        fit_task(CellResources(cpus_per_cell=3), Cluster("local", ((2, 0), (2, 0)), True), True)
