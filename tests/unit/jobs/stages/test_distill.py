"""What trainings on an elastic group cost."""

from __future__ import annotations

import pytest

from cluster.capacity import Group
from jobs.stages.distill import _costs


def test_each_training_is_counted_on_the_workers_that_it_had() -> None:
    """The first was restarted on four of eight workers after half of its hour."""
    results = [
        {"seconds": 3600.0, "worker_seconds": 1800.0 * (8 + 4), "world": 4},
        {"seconds": 1800.0, "worker_seconds": 1800.0 * 2, "world": 2},
    ]
    for group, device, hours in (
        (Group(8, 3, 0, 2), "cpu", 0.5 * 12 * 3 + 0.5 * 2 * 3),
        (Group(8, 3, 1, 2), "gpu", 0.5 * 12 + 0.5 * 2),
    ):
        found = _costs(group, results)
        assert found == {"device": device, "device_hours": pytest.approx(hours)}
