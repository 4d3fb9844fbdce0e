"""What trainings on an elastic group cost."""

from __future__ import annotations

import pytest

from cluster.workers import Group
from jobs.stages.distill import _costs


def test_each_training_is_counted_on_the_workers_that_it_had() -> None:
    results = [{"seconds": 3600.0, "world": 4}, {"seconds": 1800.0, "world": 2}]
    for group, device, hours in (
        (Group(8, 3, 0, 2), "cpu", 4 * 3 + 0.5 * 2 * 3),
        (Group(8, 3, 1, 2), "gpu", 4 + 0.5 * 2),
    ):
        found = _costs(group, results)
        assert found == {"device": device, "device_hours": pytest.approx(hours)}
