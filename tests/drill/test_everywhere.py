"""A call on every node, and what Ray tells of the packages that it installs there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.nodes import Silent, install_seconds, run_on_every_node

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def ray() -> Iterator[Any]:
    """Where Ray would install a package for whatever is to run."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    yield ray
    ray.shutdown()


def begin(ray: Any, **environment: Any) -> None:
    ray.init(
        address="local",
        num_cpus=1,
        object_store_memory=100_000_000,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=environment,
    )


def answer(seconds: float, wrong: bool) -> float:
    time.sleep(seconds)
    if wrong:
        raise OSError("the disk\nis gone")
    return seconds


def test_nodes_answer_or_are_named(ray: Any) -> None:
    begin(ray)
    assert install_seconds() == 0
    waits: list[tuple[list[str], int]] = []

    def on_wait(waiting: list[str], count: int) -> None:
        waits.append((waiting, count))

    [good] = run_on_every_node(answer, 2.0, False, on_wait=on_wait)
    assert good.value == 2.0 and good.error is good.lost is None
    # Who tells of the first that is waited for can do so at every word.
    assert waits and all(each == ([good.node], 1) for each in waits)
    [bad] = run_on_every_node(answer, 0, True)
    assert bad.error == "OSError: the disk is gone" and bad.value is None
    [slow] = run_on_every_node(answer, 60, False, limit_s=1)
    assert slow.lost == "gave no answer within 1 s" and slow.alive
    with pytest.raises(Silent):
        run_on_every_node(answer, 60, False, should_stop=lambda: True)


def test_ray_tells_how_long_packages_may_take(ray: Any) -> None:
    begin(ray, pip=["psutil"], config={"eager_install": False, "setup_timeout_seconds": 77})
    assert install_seconds() == 77
