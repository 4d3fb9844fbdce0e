"""What a worker group lost, in words."""

from __future__ import annotations

from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cluster.failures import in_words


def died(text: str) -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError(text))


def test_a_node_that_is_gone_is_told_from_a_worker_that_is() -> None:
    node = died("The actor died because its node has died. Node Id: abc")
    worker = died("The actor is dead because its worker process has died.")
    assert in_words({1: worker})[0] == "a lost worker"
    what, why = in_words({0: ConnectionError("reset by peer"), 1: worker, 2: node})
    assert what == "a lost node" and why.startswith("rank 2 (and 2 more): ")
    assert "\n" not in why


def test_errors_of_the_ranks_themselves_are_errors() -> None:
    assert in_words({0: OSError("disk\nfull")}) == ("an error", "rank 0: disk full")
