"""Ray's Jobs API at the address of a dashboard: send a job, ask for it, read its log, stop it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 60.0
# Ray lets these replace any address that it is given.
_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_ENVIRONMENT = threading.RLock()  # all threads have one
LIVE_IN_RAY = ("PENDING", "RUNNING")


class Unreachable(ConnectionError):
    """No dashboard answers at the address, or it does not let us in; one line."""


@dataclass(frozen=True)
class RayJob:
    """A job as Ray knows it. status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""

    id: str
    status: str
    message: str
    metadata: Mapping[str, str]

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.status in LIVE_IN_RAY


class RayJobs:
    """The jobs of one cluster, by the address of its dashboard."""

    def __init__(self, address: str) -> None:
        """address: http://HOST:PORT. Raises Unreachable at once if nobody answers there."""
        self.address = address
        _knock(address)
        with _only(address):
            try:
                self._client = _client(address)
            except Exception as error:
                raise Unreachable(_why(address, error)) from error

    def submit(
        self,
        id: str,
        entrypoint: str,
        runtime_env: Mapping[str, Any],
        metadata: Mapping[str, str],
    ) -> None:
        """Sends a job under an id that none had before. All methods may raise Unreachable."""
        with self._translated():
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=id,
                runtime_env=dict(runtime_env),
                metadata=dict(metadata),
            )

    def find(self, id: str) -> RayJob | None:
        """A job by its id; None if Ray does not know it (any more)."""
        with self._translated():
            try:
                return _job(self._client.get_job_info(id))
            except RuntimeError as error:
                if "404" in str(error) or "does not exist" in str(error):
                    return None
                raise

    def all(self) -> list[RayJob]:
        """All jobs that were sent, in no order."""
        with self._translated():
            return [_job(each) for each in self._client.list_jobs() if each.submission_id]

    def log(self, id: str) -> str:
        """What a job has written so far."""
        with self._translated():
            return str(self._client.get_job_logs(id))

    def stop(self, id: str) -> None:
        """Asks Ray to end a job: SIGTERM, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S."""
        with self._translated():
            self._client.stop_job(id)

    def nodes(self) -> list[dict[str, float]]:
        """The resources in all of every living node."""
        with _only(self.address), self._translated():
            from ray.util.state import list_nodes

            found = list_nodes(self.address, limit=10_000)
        return [dict(each.resources_total or {}) for each in found if each.state == "ALIVE"]

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """What Ray's client, and the library below it, raise in many kinds, as Unreachable."""
        try:
            yield
        except Exception as error:
            raise Unreachable(_why(self.address, error)) from error


def _client(address: str) -> Any:  # noqa: ANN401
    """Ray's client, with a time limit; with this user's token where the cluster asks for one."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *arguments: Any, **more: Any) -> Any:  # Ray's has no limit  # noqa: ANN401
            return super()._do_request(*arguments, **{"timeout": ANSWER_SECONDS, **more})

    try:
        return Client(address)
    except AuthenticationError:
        # Ray has no public name for this; its own `ray.init` and `ray start` do the same.
        from ray._private.authentication import authentication_token_setup as tokens

        if not tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise
        return Client(address)


def _job(details: Any) -> RayJob:  # noqa: ANN401
    return RayJob(
        details.submission_id,
        str(getattr(details.status, "value", details.status)),
        details.message or "",
        details.metadata or {},
    )


def _knock(address: str) -> None:
    """Raises Unreachable unless something listens there; Ray's own client has no time limit."""
    parts = urlsplit(address)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS):
            pass
    except (OSError, ValueError) as error:
        raise Unreachable(_why(address, error)) from error


def _why(address: str, error: Exception) -> str:
    if type(error).__name__ == "AuthenticationError":
        return (
            f"{address}: the cluster wants another token than this machine has; set "
            "RAY_AUTH_TOKEN_PATH to a file with the cluster's (on its head: `ray get-auth-token`)"
        )
    told = " ".join(str(error).split())[:300]
    return (
        f"{address}: no Ray dashboard answers there as it should ({told}); may be "
        "http://HOST:8265 of a running head, e.g. after `ray start --head`, or through "
        "`kubectl port-forward`"
    )


@contextlib.contextmanager
def _only(address: str) -> Iterator[None]:
    """Takes away, for the time of the block, what Ray would prefer to `address`."""
    import ray  # noqa: F401  (sets the level of its own messages, on its first import)

    logging.getLogger("ray").setLevel(logging.ERROR)  # of its packages and tokens nobody asked
    with _ENVIRONMENT:
        kept = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
        try:
            yield
        finally:
            os.environ.update(kept)
