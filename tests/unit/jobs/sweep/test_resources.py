"""What tasks of a sweep take: the pass that all cells of a large model wait for has a machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from cluster.session import Cluster
from cluster.spec import CellResources
from jobs.sweep.resources import CellRequests

NODES = ((2, 0), (16, 0), (8, 0))


@pytest.mark.parametrize(
    ("weights", "asked", "gpus", "cpus"),
    [
        (135_000_000, "auto", 0.0, 16),
        (1_000_000, "auto", 0.0, 1),
        (135_000_000, 3, 0.0, 3),
        (135_000_000, "auto", 1.0, 1),
    ],
)
def test_the_pass_of_a_large_model_has_all_cores_of_a_machine(
    weights: int, asked: Any, gpus: float, cpus: int
) -> None:
    resources = CellResources(cpus_per_cell=asked, memory_gb_per_cell=1)
    sweep: Any = None
    own = 1 if asked == "auto" else asked
    models = {"student": nn.Linear(1000, weights // 1000, bias=False, device="meta")}
    needs = CellRequests(sweep, resources, Cluster("x", NODES, False), 128, own, gpus, models)
    source: Any = SimpleNamespace(role="student")
    assert needs.reference(source).cpus == cpus
    assert needs.model(source).cpus == own
