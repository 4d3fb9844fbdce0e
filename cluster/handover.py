"""More work for a group of workers that is running, through Ray's own key-value store.

The group's function asks for it when it has done what it was started with: processes that have
imported everything go on, where new ones would take a quarter of a minute to start.
"""

from __future__ import annotations

import pickle
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from cluster.kv import store

_NAMESPACE = "worker-groups"
_POLL_S = 0.2
# A group that was forgotten gives its resources back.
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Handover:
    """One group's pieces of work, numbered from 1. Picklable: the driver puts, the group takes."""

    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def put(self, number: int, work: Any) -> None:
        """Hands over a piece of work; None: there is no more."""
        from ray import cloudpickle

        store()._internal_kv_put(self._key(number), cloudpickle.dumps(work), namespace=_NAMESPACE)

    def take(self, number: int) -> bytes:
        """Waits for a piece of work, and returns it pickled; None, pickled, if none comes."""
        ends = time.monotonic() + _PATIENCE_S
        while time.monotonic() < ends:
            found: bytes | None = store()._internal_kv_get(self._key(number), namespace=_NAMESPACE)
            if found is not None:
                return found
            time.sleep(_POLL_S)
        return pickle.dumps(None)

    def clear(self) -> None:
        """Forgets everything."""
        store()._internal_kv_del(f"{self.name}/", del_by_prefix=True, namespace=_NAMESPACE)

    def _key(self, number: int) -> str:
        return f"{self.name}/{number}"
