"""One call on every node of a cluster, so that what differs between machines is known early."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_POLL_S = 0.5


@dataclass(frozen=True)
class Answer:
    """What one node answered: a value, or why there is none. node: its address, and its id."""

    node: str
    value: Any = None
    error: str | None = None


class Silent(RuntimeError):
    """The call was given up by `should_stop`."""


def on_every_node(
    function: Callable[..., Any],
    *arguments: Any,
    limit_s: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_wait: Callable[[list[str], int], None] = lambda waiting, count: None,
) -> list[Answer]:
    """Calls `function(*arguments)` once on every living node, at the same time.

    A node that raises, dies, or gives no answer within `limit_s` seconds is an `Answer` with an
    error. on_wait(waiting, count): called again and again with the nodes that have not answered, of
    `count`. Raises Silent if `should_stop()` says so.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(function)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked: dict[Any, str] = {}
    for node in nodes:
        # No CPU is asked for: a node whose CPUs are taken, or that has none, answers as well.
        options = {
            "num_cpus": 0,
            "max_retries": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        }
        reference = remote.options(**options).remote(*arguments)
        asked[reference] = f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
    answers, began = [], time.monotonic()
    while asked:
        if should_stop():
            for reference in asked:
                ray.cancel(reference, force=True)
            raise Silent
        ready, _ = ray.wait(list(asked), num_returns=1, timeout=_POLL_S)
        for reference in ready:
            answers.append(_answer(asked.pop(reference), reference))
        if asked and limit_s is not None and time.monotonic() - began > limit_s:
            for reference, node in asked.items():
                ray.cancel(reference, force=True)
                answers.append(Answer(node, error=f"gave no answer within {limit_s:g} s"))
            break
        on_wait(sorted(asked.values()), len(nodes))
    return sorted(answers, key=lambda answer: answer.node)


def _answer(node: str, reference: Any) -> Answer:
    import ray

    try:
        return Answer(node, ray.get(reference))
    except Exception as error:  # of whatever the function raised, or Ray on its way
        cause = getattr(error, "cause", None) or error
        text = " ".join(str(cause).split())[:300]
        return Answer(node, error=f"{type(cause).__name__}: {text}")
