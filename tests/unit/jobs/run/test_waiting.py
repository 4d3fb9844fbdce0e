"""What workers and tasks wait for that are not at work, and for how long they may."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.capacity import Group
from cluster.resources import ResourceRequest
from cluster.session import Resources
from jobs.run import waiting as module
from jobs.run.waiting import NotPlaced, Placement, tasks_wait


class World:
    """A clock, a cluster, and what was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, minutes: float = 10.0) -> None:
        self.now, self.pending = 1000.0, True
        self.idle = Resources(3, 2)
        self.waits: list[Any] = []
        self.said: list[str] = []
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "free", lambda: (Resources(16, 4), self.idle))
        monkeypatch.setattr(module, "is_pending", lambda group: self.pending)
        resources = SimpleNamespace(placement_minutes=minutes)
        self.context: Any = SimpleNamespace(
            spec=SimpleNamespace(resources=resources),
            heartbeat=SimpleNamespace(update=lambda waits: self.waits.append(waits)),
            reporter=SimpleNamespace(waits=lambda stage, why: self.said.append(f"{stage}: {why}")),
        )


def test_a_group_that_is_not_placed_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    placement = Placement(world.context, "distill", Group(8, 1, 1))
    placement.look(at_work=False)
    assert world.waits == ["waiting for 8 GPUs: cluster has 4, 2 free"]
    world.now += 1
    placement.look(at_work=False)
    assert len(world.waits) == 1  # asked for every few seconds only
    world.now, world.pending = world.now + 3, False
    placement.look(at_work=False)
    assert world.waits[-1] == "starting 8 workers of 1 CPUs and 1 GPUs"
    assert world.said == [f"distill: {why}" for why in world.waits]


def test_elastic_groups_wait_for_their_fewest(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    Placement(world.context, "distill", Group(8, 2, 0, fewest=4)).look(at_work=False)
    assert world.waits == ["waiting for 8 CPUs: cluster has 16, 3 free"]


def test_a_group_may_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    placement = Placement(world.context, "capture", Group(2, 1, 0))
    placement.look(at_work=False)
    world.now += 590
    placement.look(at_work=False)
    placement.look(at_work=True)  # and then a node was lost
    world.now += 20
    placement.look(at_work=False)
    world.now += 599
    placement.look(at_work=False)
    world.now += 4
    with pytest.raises(NotPlaced) as error:
        placement.look(at_work=False)
    assert "resources.placement_minutes (10)" in str(error.value)
    assert "cluster has 16, 3 free" in str(error.value)


def test_tasks_say_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, minutes=1.0)
    on_wait = tasks_wait(world.context, "sweep")
    on_wait(ResourceRequest(1), 3.0)
    world.idle = Resources(0, 0)
    on_wait(ResourceRequest(1), 6.0)
    on_wait(ResourceRequest(1, 0.5), 9.0)
    assert world.waits == [
        "starting tasks",
        "waiting for 1 CPUs: cluster has 16, 0 free",
        "waiting for 0.5 GPUs: cluster has 4, 0 free",
    ]
    with pytest.raises(NotPlaced):
        on_wait(ResourceRequest(1), 61.0)
