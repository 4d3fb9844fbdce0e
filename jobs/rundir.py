"""The run directory: which stages are done with which inputs, attempts, stop requests, events."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from cluster.storage import Attempt, Store


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One text per key that differs: ``distill.steps: 400 -> 500``."""
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(set(old) | set(new))
        if old.get(key) != new.get(key)
    ]


@dataclass(frozen=True)
class StageRecord:
    """What a stage was made from, and what it gave; `finished` or to be done again."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    finished: bool


class RunDir:
    """One run's directory, with the attempt that this process holds."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.attempt: Attempt | None = None

    def claim(self, job: str | None = None) -> Attempt:
        """Starts a new attempt; older ones can no longer publish. job: the Ray job it is of."""
        self.attempt = Attempt.claim(self.store, job=job)
        return self.attempt

    def was_begun(self, stage: str, job: str) -> bool:
        """Whether an attempt of this Ray job has forgotten or finished a stage."""
        attempts = self.store.list("state/attempts")
        numbers = [
            name.partition(".")[0]
            for name in attempts
            if self.store.read_json(f"state/attempts/{name}").get("job") == job
        ]
        return any(self.store.exists(f"state/{stage}-{number}.json") for number in numbers)

    def current(self) -> Attempt:
        """This process's attempt."""
        if self.attempt is None:
            raise RuntimeError("no attempt claimed")
        return self.attempt

    def record(self, stage: str) -> StageRecord | None:
        """The newest record of a stage, None if it was never finished."""
        names = [n for n in self.store.list("state") if n.startswith(f"{stage}-")]
        if not names:
            return None
        data = self.store.read_json(f"state/{max(names)}")
        return StageRecord(data["inputs"], data["outputs"], not data.get("redo"))

    def forget(self, stage: str) -> None:
        """From now on the stage counts as not done, also for attempts to come."""
        record, attempt = self.record(stage), self.current()
        if record is not None:
            attempt.write_json(
                f"state/{stage}-{attempt.number:04d}.json",
                {"stage": stage, "redo": True, "inputs": record.inputs, "outputs": record.outputs},
            )

    def finish(
        self, stage: str, inputs: dict[str, Any], outputs: dict[str, Any], seconds: float
    ) -> None:
        """Records that a stage is done; from now on it is skipped."""
        attempt = self.current()
        attempt.write_json(
            f"state/{stage}-{attempt.number:04d}.json",
            {
                "stage": stage,
                "attempt": attempt.number,
                "inputs": inputs,
                "outputs": outputs,
                "seconds": seconds,
                "finished": time.time(),
            },
        )
