"""One call on every node of a cluster, so that what differs between machines is known early."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cluster.installing import not_installed

_POLL_S = 0.5
RETRIES = 2  # of a worker that dies; a node that is gone stays so


@dataclass(frozen=True)
class Answer:
    """What one node answered: a value, or why there is none. node: its address, and its id.

    error: what the function raised; lost: why the node could not be asked. alive: whether Ray still
    has it.
    """

    node: str
    value: Any = None
    error: str | None = None
    lost: str | None = None
    alive: bool = True


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

    A node that raises, dies, or gives no answer within `limit_s` seconds is an `Answer` without a
    value. on_wait(waiting, count): called again and again with the nodes that have not answered,
    never none, of `count`. Raises Silent if `should_stop()` says so.
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
            "max_retries": RETRIES,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        }
        reference = remote.options(**options).remote(*arguments)
        asked[reference] = f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
    answers, began = [], time.monotonic()
    while asked:
        if should_stop():
            for reference in asked:
                ray.cancel(reference, force=False)
            raise Silent
        ready, _ = ray.wait(list(asked), num_returns=1, timeout=_POLL_S)
        for reference in ready:
            answers.append(_answer(asked.pop(reference), reference))
        if asked and limit_s is not None and time.monotonic() - began > limit_s:
            for reference, node in asked.items():
                ray.cancel(reference, force=False)
                answers.append(Answer(node, lost=f"gave no answer within {limit_s:g} s"))
            break
        if asked:
            on_wait(sorted(asked.values()), len(nodes))
    living = {node["NodeID"][:8] for node in ray.nodes() if node["Alive"]}
    told = [replace(each, alive=each.node.rpartition("(")[2][:-1] in living) for each in answers]
    return sorted(told, key=lambda answer: answer.node)


def _answer(node: str, reference: Any) -> Answer:
    import ray

    try:
        return Answer(node, ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        return Answer(node, error=_in_words(error.cause or error))
    except Exception as error:  # Ray's own, of many kinds
        why = not_installed(str(error)) or _in_words(error)
        return Answer(node, lost=f"could not be asked ({why})")


def _in_words(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}"
