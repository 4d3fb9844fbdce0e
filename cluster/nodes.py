"""The nodes of a cluster: one call on each, what Ray installs there, and which are about to go."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

# Fields of Ray's runtime environment by which it installs packages, and its own limit for that.
_INSTALLERS = ("pip", "uv", "conda")
_LIMIT_S = 600.0


def install_seconds() -> float:
    """How long Ray may take to install this job's packages on a node; 0 if it installs none."""
    import ray

    environment = ray.get_runtime_context().runtime_env
    if not any(environment.get(kind) for kind in _INSTALLERS):
        return 0.0
    limit = float((environment.get("config") or {}).get("setup_timeout_seconds", _LIMIT_S))
    return limit if limit > 0 else math.inf  # -1: none


def not_installed(text: str) -> str | None:
    """The line that says why, of Ray's traceback with what pip printed; None for another text."""
    if "Failed to set up runtime environment" not in text:
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:")]
    why = (errors or lines)[-1].removeprefix("ERROR: ")
    node = re.search(r"\[Node ([^\]]+)\]", text)
    where = f"node {node[1]}" if node else "a node"
    return (
        f"packages could not be installed on {where}: {why[:300]} (all that was said is in "
        "runtime_env_setup-*.log among Ray's logs there)"
    )


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


def run_on_every_node(
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


def _answer(node: str, reference: Any) -> Answer:  # noqa: ANN401
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


@dataclass(frozen=True)
class Notice:
    """A node will go. seconds: from now, None where the notice does not say when."""

    node: str
    seconds: float | None

    def __str__(self) -> str:
        when = "soon" if self.seconds is None else f"in {max(0.0, self.seconds):.0f} s"
        return f"node {self.node[:8]} will be taken away {when}"


class Draining:
    """Looks for notices, at most once in `every_s` seconds; each is told once."""

    def __init__(self, every_s: float = 3.0) -> None:
        self._every_s, self._next = every_s, 0.0
        self._told: set[str] = set()

    def poll(self) -> list[Notice]:
        """Notices that no earlier call returned; of the cluster this process is connected to."""
        if time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + self._every_s
        # Ray has no public name for this; its own Train asks in the same way.
        from ray._private.state import state

        found = state.get_draining_nodes()
        fresh = [node for node in sorted(found) if node not in self._told]
        self._told.update(fresh)
        now = time.time()
        return [Notice(n, found[n] / 1000 - now if found[n] else None) for n in fresh]
