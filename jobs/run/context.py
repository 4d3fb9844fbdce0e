"""What every stage gets to work with."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.capacity import Group
from cluster.session import Cluster
from cluster.storage import Attempt, EventTail, EventWriter, Store
from jobs.run.directory import RunDir
from jobs.run.heartbeat import Heartbeat
from jobs.run.inputs import Outputs, ResolvedJob
from jobs.run.progress import Reporter
from jobs.spec.job import JobSpec

if TYPE_CHECKING:
    from cluster.workers import Launch


@dataclass(frozen=True)
class WaitingGroup:
    """A group that has done its stage and waits for the work of another one."""

    launch: Launch
    group: Group
    stage: str

    def fits(self, stage: str, group: Group) -> bool:
        """Whether it is for this stage, as large as that needs it, and still there."""
        return (self.stage, self.group) == (stage, group) and not self.launch.wait(0)


@dataclass
class Context:
    """One attempt of one run, while its stages run."""

    run: RunDir
    job: ResolvedJob
    outputs: Outputs
    events: EventWriter
    tail: EventTail
    reporter: Reporter
    cluster: Cluster
    heartbeat: Heartbeat
    stop: threading.Event = field(default_factory=threading.Event)
    saves_asked: int = 0  # checkpoints out of turn
    forced: bool = False  # the user asked for this stage again, from its beginning
    to_run: Sequence[str] = ()  # the stages of this attempt
    waiting: WaitingGroup | None = None  # workers of a stage that are there for the next one

    @property
    def attempt(self) -> Attempt:
        return self.run.current()

    @property
    def spec(self) -> JobSpec:
        return self.job.spec

    @property
    def shared(self) -> Store:
        """Where corpora and caches of all runs are."""
        return self.job.storage

    @property
    def corpus(self) -> Store:
        return self.shared.sub("_corpora", self.outputs["prepare"]["corpus"])

    @property
    def cache(self) -> Store | None:
        if "capture" not in self.outputs:
            return None
        return self.shared.sub("_logits", self.outputs["capture"]["cache"])

    def emit(self, event: str, **fields: Any) -> None:
        """Records an event of the driver, and shows it."""
        self.events.emit(event, **fields)
        self._show({"event": event, **fields})

    def pump(self) -> list[dict[str, Any]]:
        """Shows what the workers have recorded since the last call, and returns it."""
        told = [event for event in self.tail.poll() if event.get("worker")]
        for event in told:
            self._show(event)
        return told

    def release(self, but: str | None = None) -> None:
        """Ends the group that waits for work, unless it is for the stage `but`."""
        there = self.waiting
        if there is None or there.stage == but:
            return
        self.waiting = None
        there.launch.hand(None)
        while not there.launch.wait(0.3):
            self.pump()
        there.launch.error()

    def _show(self, event: dict[str, Any]) -> None:
        self.reporter.event(event)
        self.heartbeat.event(event)
