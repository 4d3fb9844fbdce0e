"""Attempts of a run: each start claims the next number, and an older one may not publish."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from typing import Any

from cluster.storage import strict_json
from cluster.storage.store import Store

FOLDER = "state/attempts"
NAME = re.compile(r"^(\d+)\.json$")


class Fenced(RuntimeError):
    """A newer attempt of the same run has started; this one must stop and publish nothing."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run, numbered from 1; picklable, so workers can publish under its fence.

    The fence is looked at before each write, so a write that is already under way when a newer
    attempt starts still lands: what must not be replaced belongs under an immutable name.
    """

    store: Store
    number: int

    @staticmethod
    def claim(store: Store, **info: Any) -> Attempt:
        """Claim the next number by exclusive create; `info` is kept in its object.

        Of several claimers at once each gets a number of its own.
        """
        number = Attempt.latest(store) + 1
        while True:
            body = {
                "attempt": number,
                "claimed_at": time.time(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                **info,
            }
            data = strict_json.encode(body, indent=2, lenient=True)
            if store.create(f"{FOLDER}/{number:04d}.json", data):
                return Attempt(store, number)
            number = max(number, Attempt.latest(store)) + 1

    @staticmethod
    def latest(store: Store) -> int:
        """The highest number claimed so far; 0 if the run was never started."""
        found = (NAME.match(name) for name in store.list(FOLDER))
        return max((int(match[1]) for match in found if match), default=0)

    def fence(self) -> None:
        """Raise Fenced if a newer attempt exists."""
        latest = Attempt.latest(self.store)
        if latest > self.number:
            raise Fenced(
                f"attempt {self.number} of {self.store.url} was superseded by attempt {latest}; "
                "it stops without publishing"
            )

    def write_json(self, p: str, value: object) -> None:
        """`fence()`, then the store's write_json."""
        self.fence()
        self.store.write_json(p, value)

    def write_bytes(self, p: str, data: bytes) -> None:
        """`fence()`, then the store's write_bytes."""
        self.fence()
        self.store.write_bytes(p, data)

    def upload_folder(self, local_dir: str | os.PathLike[str], p: str) -> None:
        """`fence()`, then the store's upload_folder."""
        self.fence()
        self.store.upload_folder(local_dir, p)
