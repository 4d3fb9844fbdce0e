"""Nodes with GPUs of several types: tasks that ask for one type, and speeds of one alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.resources import ResourceRequest
from cluster.session import GPU_TYPE, Cluster
from jobs.sweep.resources import CellRequests

H100 = {"CPU": 8.0, "GPU": 4.0, GPU_TYPE + "H100": 1.0}
L4 = {"CPU": 8.0, "GPU": 8.0, GPU_TYPE + "L4": 1.0}


def test_a_need_of_one_type_fits_its_nodes_alone() -> None:
    assert ResourceRequest(1, 1, gpu_type="H100").times(H100) == 4
    assert ResourceRequest(1, 1, gpu_type="H100").times(L4) == 0
    assert ResourceRequest(1, 1).times(L4) == 8
    assert str(ResourceRequest(1, 1, gpu_type="L4")) == "1 CPUs and 1 L4 GPUs"
    assert str(ResourceRequest(1, 1)) == "1 CPUs and 1 GPUs"


def needs(gpus: float, *types: str) -> CellRequests:
    sizes: Any = tuple((16, 4 if kind else 0) for kind in types)
    cluster = Cluster("x", sizes, False, machines=len(types), gpu_types=types)
    other: Any = SimpleNamespace()
    return CellRequests(other, other, cluster, 128, 1, gpus, {})


@pytest.mark.parametrize(
    ("types", "measured", "chosen", "machines"),
    [
        (("H100", "L4", "L4"), (), "L4", 2),
        (("H100", "L4", "L4"), ("H100",), "H100", 1),
        (("H100", "L4", "L4"), ("B200",), "L4", 2),
        (("", "H100"), (), "H100", 1),
    ],
)
def test_speeds_are_of_one_type_of_gpu(
    types: tuple[str, ...], measured: tuple[str, ...], chosen: str, machines: int
) -> None:
    need, count = needs(1, *types).exclusive(measured)
    assert (need.gpu_type, count, need.gpus) == (chosen, machines, 1)


def test_on_cpus_there_is_no_type() -> None:
    need, count = needs(0, "", "", "H100").exclusive()
    assert (need.gpu_type, need.gpus, count) == ("", 0, 3)
