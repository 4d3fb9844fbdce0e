"""Storage that all machines share: whole objects, attempts and events on any fsspec URL.

Imports neither Ray nor torch, so trainer and quant may use it under plain torchrun.
"""

from __future__ import annotations

from cluster.storage.attempts import Attempt, Fenced
from cluster.storage.events import EventTail, EventWriter, read_events
from cluster.storage.store import Store, open_store

__all__ = [
    "Attempt",
    "EventTail",
    "EventWriter",
    "Fenced",
    "Store",
    "open_store",
    "read_events",
]
